# SPDX-License-Identifier: MIT
"""What the kernel's own tests demand of KSM, demanded of mergemem.

Retold from tools/testing/selftests/mm of the kernel: each docstring names the test whose question
it asks. What is a knob of KSM there is a request here, so nobody waits for a scan; "pages shared"
is shared_pages, "pages sharing" is shared_mappings - shared_pages.
"""

from __future__ import annotations

import pytest

from tests.kernel import frames, nodes
from tests.kernel.actor import (
    MADV_DONTNEED,
    PAGE_BYTES,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    Region,
    Stage,
    content,
)
from tests.kernel.contract import Result, State
from tests.kernel.module import Module
from tests.kernel.sharing import flat, pairs, write_privately
from tests.kernel.syscalls import read_memory, traced
from tests.kernel.userfault import MODE_WP, watched
from tests.kernel.wire import Client

# 2 MiB, as there, and all of one content.
PAGES, SEED = 512, 140


@pytest.fixture
def merged(stage: Stage, client: Client) -> Region:
    """2 MiB of one process that are one frame."""
    region = stage.start().region(PAGES, SEED, period=1)
    assert client.merge(list(region)) == [[Result.SUCCESS] * PAGES]
    assert frames.assert_shared(region)
    assert totals(client) == (1, PAGES)
    return region


def totals(client: Client) -> tuple[int, int]:
    info = client.info()
    return info.shared_pages, info.shared_mappings


def unmerge(client: Client, region: Region, first: int = 0, pages: int = PAGES) -> int:
    return client.unmerge(region.actor.key, region[first].address, pages)[0]


def test_unmerge(merged: Region, client: Client) -> None:
    """ksm_functional_tests: unmerge."""
    assert unmerge(client, merged) == PAGES
    frames.assert_distinct(merged)
    merged.verify()
    assert totals(client) == (0, 0)


def test_unmerge_zero_pages(stage: Stage, client: Client) -> None:
    """ksm_functional_tests: unmerge_zero_pages; half by request, half by writes."""
    actor = stage.start()
    region = Region(actor, actor.map(PAGES), PAGES, SEED)
    actor.ask("clear", region.address, PAGES)
    before = actor.status("RssAnon")
    assert client.merge_zeros(*region) == [Result.ZEROED] * PAGES
    assert set(client.records(region)["state"].tolist()) == {State.ZERO_PAGE}
    assert totals(client) == (0, 0)
    assert actor.status("RssAnon") <= before - PAGES + 128
    actor.ask("write", region.address, 7, PAGES)
    frames.assert_distinct(region)
    actor.ask("write", region.address, 0, PAGES)
    assert actor.ask("zeros", region.address, PAGES) == "1"


def test_unmerge_discarded(merged: Region, client: Client) -> None:
    """ksm_functional_tests: unmerge_discarded; what is gone stays gone."""
    merged.actor.ask("madvise", merged.address, PAGES // 2, MADV_DONTNEED)
    assert totals(client) == (1, PAGES // 2)
    assert unmerge(client, merged) == PAGES // 2
    assert not merged.frames[: PAGES // 2].any()
    frames.assert_distinct(list(merged)[PAGES // 2 :])
    assert merged.actor.ask("zeros", merged.address, PAGES // 2) == "1"
    rest = merged[PAGES // 2].address
    assert merged.actor.ask("verify", rest, PAGES // 2, SEED, 1) == "same"
    assert totals(client) == (0, 0)


def test_unmerge_uffd_wp(merged: Region, client: Client) -> None:
    """ksm_functional_tests: unmerge_uffd_wp; here a write needs the handler's leave."""
    with watched(merged, MODE_WP) as userfault:
        userfault.protect(True)
        assert unmerge(client, merged) == 0
        assert totals(client) == (1, PAGES)
        userfault.protect(False)
        assert unmerge(client, merged) == PAGES
        assert userfault.quiet()
    frames.assert_distinct(merged)
    merged.verify()


def test_prot_none(merged: Region, client: Client) -> None:
    """ksm_functional_tests: prot_none; a debugger writes to half of it, the rest is unmerged."""
    merged.actor.ask("mprotect", merged.address, PAGES, PROT_NONE)
    half = PAGES // 2
    pid = merged.actor.pid
    # Newer kernels override protections for a debugger only.
    with traced(pid), open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        for page in range(half):
            memory.seek(merged[page].address)
            memory.write(page.to_bytes(8, "little"))
    assert unmerge(client, merged, half, half) == half
    frames.assert_distinct(merged)
    assert client.merge(list(merged)[half:]) == [[Result.REFUSED] * half]
    merged.actor.ask("mprotect", merged.address, PAGES, PROT_READ | PROT_WRITE)
    assert merged.actor.ask("verify", merged[half].address, half, SEED, 1) == "same"
    for page in (0, 1, half - 1):
        expected = page.to_bytes(8, "little") + content(SEED, 0)[8:]
        assert read_memory(pid, merged[page].address, 1) == expected


def test_fork(merged: Region, client: Client) -> None:
    """ksm_functional_tests: prctl_fork; a child shares on, and its own memory merges as well."""
    child = merged.of(merged.actor.fork())
    assert totals(client) == (1, 2 * PAGES)
    own = child.actor.region(PAGES, SEED, period=1)
    # Up to the limit of mappings of one frame, all of them are the same frame.
    assert client.merge([merged[0], *own]) == [[Result.ALREADYSH] + [Result.SUCCESS] * PAGES]
    frames.assert_shared([*merged, *child, *own])
    assert totals(client) == (1, 3 * PAGES)
    write_privately(child, 0, merged)
    child.actor.exit()
    assert totals(client) == (1, PAGES)
    merged.verify()


def test_fork_and_exec(merged: Region, client: Client) -> None:
    """ksm_functional_tests: prctl_fork_exec; a program begins with nothing merged, then may be."""
    child = merged.actor.fork().exec()
    assert totals(client) == (1, PAGES)
    own = child.region(PAGES, SEED, period=1)
    frames.assert_distinct(own)
    assert client.merge(list(own)) == [[Result.SUCCESS] * PAGES]
    assert totals(client) == (2, 2 * PAGES)
    child.exit()
    assert totals(client) == (1, PAGES)
    merged.verify()


def test_unmerge_process(merged: Region, stage: Stage, client: Client) -> None:
    """ksm_functional_tests: prctl_unmerge; a process as a whole, and no other."""
    second = merged.actor.region(PAGES, SEED, period=1)
    other = stage.start().region(PAGES, SEED, period=1)
    client.merge([merged[0], *second, *other])
    assert totals(client) == (1, 3 * PAGES)
    end_of_user_space = 1 << 47
    assert client.unmerge(merged.actor.key, 0, end_of_user_space // PAGE_BYTES - 1)[0] == 2 * PAGES
    frames.assert_distinct([*merged, *second])
    assert totals(client) == (1, PAGES)
    for region in (merged, second, other):
        region.verify()


def test_merging_pages(merged: Region, client: Client) -> None:
    """ksm_functional_tests: /proc/PID/ksm_merging_pages, before, between and after."""

    def merged_pages() -> int:
        return int((client.records(merged)["state"] == State.MERGED).sum())

    assert merged_pages() == PAGES
    unmerge(client, merged, 0, 100)
    assert merged_pages() == PAGES - 100
    unmerge(client, merged)
    assert merged_pages() == 0


def test_exact_counts(stage: Stage, module: Module) -> None:
    """ksm_tests -M: equal pages at a limit of ten mappings; a last one alone gains nothing."""
    expected = {
        2: (1, 2),
        9: (1, 9),
        10: (1, 10),
        11: (1, 10),
        12: (2, 12),
        20: (2, 20),
        21: (2, 20),
    }
    actor = stage.start()
    with module.reloaded(max_mappings=10), Client() as client:
        for pages, (shared, mappings) in expected.items():
            region = actor.region(pages, SEED, period=1)
            for _ in range(4):
                client.merge(list(region))
            assert totals(client) == (shared, mappings)
            assert len(set(region.frames.tolist())) == shared + pages - mappings
            region.verify()
            actor.ask("munmap", region.address, pages)


def test_unmerge_by_one_byte(stage: Stage, client: Client) -> None:
    """ksm_tests -U: two merged pages, one byte written to each."""
    region = stage.start().region(2, SEED, period=1)
    assert client.merge(list(region)) == [[Result.SUCCESS] * 2]
    region.write(0, ord("-"))
    assert totals(client) == (1, 1)
    region.write(1, ord("+"))
    assert totals(client) == (0, 0)
    assert (region.read(0), region.read(1)) == (ord("-"), ord("+"))
    assert set(flat(client.merge(list(region)))) == {Result.ALONE, Result.NOTEQUAL} or set(
        flat(client.merge(list(region)))
    ) == {Result.NOTEQUAL}
    frames.assert_distinct(region)


@pytest.mark.parametrize("use_zero_page", [True, False])
def test_zero_pages(stage: Stage, client: Client, use_zero_page: bool) -> None:
    """ksm_tests -Z: to the kernel's zero page if the request says so, else like any content."""
    actor = stage.start()
    region = Region(actor, actor.map(20), 20, SEED)
    actor.ask("clear", region.address, 20)
    if use_zero_page:
        assert client.merge_zeros(*region) == [Result.ZEROED] * 20
        assert totals(client) == (0, 0)
    else:
        assert client.merge(list(region)) == [[Result.SUCCESS] * 20]
        frames.assert_shared(region)
        assert totals(client) == (1, 20)
    assert actor.ask("zeros", region.address, 20) == "1"
    actor.ask("fill", region.address, 20, SEED)
    region.verify()
    assert totals(client) == (0, 0)


@pytest.mark.parametrize("across_nodes", [True, False])
def test_numa(stage: Stage, client: Client, across_nodes: bool) -> None:
    """ksm_tests -N: equal pages on two nodes share only where the request says so."""
    home, away = nodes.with_memory()[0], nodes.with_memory()[-1]
    near = nodes.region_on(stage.start(), home, 2, SEED)
    far = nodes.region_on(stage.start(), away, 2, SEED)
    results = client.merge(*pairs(near, far), any_node=across_nodes)
    if across_nodes or home == away:
        assert set(flat(results)) == {Result.SUCCESS}
        assert totals(client) == (2, 4)
    else:
        assert Result.SUCCESS not in flat(results)
        assert Result.NODE in flat(results)
        frames.assert_distinct([*near, *far])
        assert (nodes.of(near), nodes.of(far)) == ([home] * 2, [away] * 2)
        assert totals(client) == (0, 0)
    for region in (near, far):
        region.verify()
