# SPDX-License-Identifier: MIT
"""UNMERGE: merged pages get frames of their own again, in one process."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.kernel import frames
from tests.kernel.actor import MADV_DONTNEED, PAGE_BYTES, PROT_READ, PROT_WRITE, Region, Stage
from tests.kernel.contract import MAX_CANDIDATES, MAX_UNMERGE_PAGES, Result
from tests.kernel.sharing import flat, merge_all, pairs, write_privately
from tests.kernel.wire import Client, Refused

PAGES, SEED = 600, 70
# So many that no frame gets more mappings than it may have.
CONTENTS = 16


@pytest.fixture
def merged(stage: Stage, client: Client) -> tuple[Region, Region]:
    """Two processes that share everything, over two page tables."""
    alice, bob = (stage.start().region(PAGES, SEED) for _ in range(2))
    assert set(flat(client.merge(*pairs(alice, bob)))) == {Result.SUCCESS}
    assert (alice.frames == bob.frames).all()
    return alice, bob


def test_everything(client: Client, merged: tuple[Region, Region]) -> None:
    alice, bob = merged
    shared = alice.frames
    before = client.info().counters["unmerged_pages"]
    end = alice.address + PAGES * PAGE_BYTES
    assert client.unmerge(alice.actor.key, alice.address, PAGES) == (PAGES, end)
    assert not np.isin(alice.frames, shared).any()
    assert alice.frames.all()
    assert (bob.frames == shared).all()
    assert all(frames.has_flag(page.frame, frames.KPF_ANON) for page in list(alice)[::100])
    alice.verify()
    bob.verify()
    info = client.info()
    assert (info.shared_pages, info.shared_mappings) == (PAGES, PAGES)
    assert info.counters["unmerged_pages"] == before + PAGES
    # Not a byte written, and yet the next write takes no fault that would copy.
    own = alice[5].frame
    alice.write(5, 1)
    assert alice[5].frame == own
    assert client.unmerge(alice.actor.key, alice.address, PAGES) == (0, end)


def test_part(client: Client, merged: tuple[Region, Region]) -> None:
    alice, bob = merged
    unmerged, after = client.unmerge(alice.actor.key, alice[510].address, 4)
    assert (unmerged, after) == (4, alice[514].address)
    same = alice.frames == bob.frames
    assert same.sum() == PAGES - 4
    assert not same[510:514].any()
    alice.verify()
    bob.verify()


def test_merges_again(client: Client, merged: tuple[Region, Region]) -> None:
    alice, bob = merged
    client.unmerge(alice.actor.key, alice.address, PAGES)
    client.unmerge(bob.actor.key, bob.address, PAGES)
    assert client.info().shared_pages == 0
    for group in pairs(alice, bob)[:10]:
        frames.assert_distinct(group)
    assert set(flat(client.merge(*pairs(alice, bob)))) == {Result.SUCCESS}
    write_privately(alice, 0, bob)


def test_read_only_memory(client: Client, merged: tuple[Region, Region]) -> None:
    alice, bob = merged
    alice.actor.ask("mprotect", alice.address, PAGES, PROT_READ)
    assert client.unmerge(alice.actor.key, alice.address, PAGES)[0] == PAGES
    alice.verify()
    alice.actor.ask("mprotect", alice.address, PAGES, PROT_READ | PROT_WRITE)
    own = alice[0].frame
    alice.write(0, 1)
    assert alice.read(0) == 1
    assert own not in bob.frames
    bob.verify()


def test_leaves_what_is_not_merged(stage: Stage, client: Client) -> None:
    """Absent pages stay absent, ordinary ones where they are, and other mappings are skipped."""
    alice, bob = (stage.start().region(PAGES, SEED) for _ in range(2))
    client.merge(*pairs(alice, bob)[100:200])
    alice.actor.ask("munmap", alice[300].address, 100)
    alice.actor.ask("madvise", alice[400].address, 100, MADV_DONTNEED)
    before = alice.frames
    unmerged, _ = client.unmerge(alice.actor.key, 0, (1 << 47) // PAGE_BYTES - 1)
    assert unmerged == 100
    changed = alice.frames != before
    assert changed[100:200].all()
    assert not changed[:100].any()
    assert not changed[200:].any()
    assert alice.actor.ask("verify", alice.address, 300, SEED) == "same"
    bob.verify()


def test_limit_of_one_request(stage: Stage, client: Client) -> None:
    pages = MAX_UNMERGE_PAGES + 1500
    region = stage.start().region(pages, SEED, period=CONTENTS)
    merge_by_content(client, region)
    unmerged, after = client.unmerge(region.actor.key, region.address, pages)
    assert MAX_UNMERGE_PAGES <= unmerged <= MAX_UNMERGE_PAGES + 511
    assert region.address < after < region.address + pages * PAGE_BYTES
    rest, end = client.unmerge(
        region.actor.key, after, pages - (after - region.address) // PAGE_BYTES
    )
    assert unmerged + rest == pages
    assert end == region.address + pages * PAGE_BYTES
    assert len(np.unique(region.frames)) == pages
    region.verify()


def test_not_enough_memory(stage: Stage, client: Client) -> None:
    """Refused before anything is changed, with a text; the host lives on."""
    pages = 16000
    region = stage.start().region(pages, SEED, period=CONTENTS)
    merge_by_content(client, region)
    with little_memory_available(pages=10000):
        with pytest.raises(Refused) as refused:
            client.unmerge(region.actor.key, region.address, pages)
        assert refused.value.errno == errno.ENOMEM
        assert "memory" in refused.value.text
        assert len(np.unique(region.frames)) == CONTENTS
    assert client.unmerge(region.actor.key, region.address, pages)[0] == pages
    region.verify()


def merge_by_content(client: Client, region: Region) -> None:
    """The pages of a region of CONTENTS contents get as many frames, by several requests."""
    listed = list(region)
    share = MAX_CANDIDATES // CONTENTS - 1
    for start in range(CONTENTS, len(listed), share * CONTENTS):
        groups = [
            [listed[n], *listed[start + n : start + share * CONTENTS : CONTENTS]]
            for n in range(CONTENTS)
        ]
        results = flat(client.merge(*groups))
        assert set(results) <= {Result.SUCCESS, Result.ALREADYSH}, Counter(results)
    assert len(np.unique(region.frames)) == CONTENTS


@contextmanager
def little_memory_available(pages: int) -> Iterator[None]:
    """Raise what the kernel keeps in reserve: quicker than using all memory up, and reversible."""
    reserve = Path("/proc/sys/vm/min_free_kbytes")
    before = reserve.read_text()
    try:
        while (rest_pages := meminfo_pages("MemAvailable") - pages) > 1000:
            # 1.5 times as much, the high watermark, is not available; approach it from below.
            reserve.write_text(str(int(reserve.read_text()) + rest_pages * 4 * 6 // 10))
        yield
    finally:
        reserve.write_text(before)


def meminfo_pages(field: str) -> int:
    """A field of /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) // 4
    raise KeyError(field)


def test_merge_all_then_exit_order(stage: Stage, client: Client) -> None:
    """Unmerging one of three leaves the other two as they were, whoever exits first."""
    regions = [stage.start().region(8, SEED) for _ in range(3)]
    merge_all(client, *regions)
    client.unmerge(regions[0].actor.key, regions[0].address, 8)
    regions[0].actor.exit()
    for group in pairs(*regions[1:]):
        frames.assert_shared(group)
    regions[1].actor.exit()
    regions[2].verify()
