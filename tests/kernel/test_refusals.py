# SPDX-License-Identifier: MIT
"""Memory, processes and callers that are refused; nothing changes by asking."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel import frames
from tests.kernel.actor import (
    MADV_DONTDUMP,
    MADV_MERGEABLE,
    MADV_WIPEONFORK,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    Page,
    ProcessKey,
    Region,
    Stage,
    start_time_ticks,
)
from tests.kernel.contract import FEATURE_CROSS_UID, Result, State
from tests.kernel.module import Module
from tests.kernel.sharing import flat, merge_all, pairs, wait_until, write_privately
from tests.kernel.wire import Client, Refused

PAGES, SEED = 4, 50
MADV_DODUMP, MADV_KEEPONFORK = 17, 19
PTRACE_CAPABILITY = 19


def advised(advice: int) -> Callable[[Stage], Region]:
    def make(stage: Stage) -> Region:
        region = stage.start().region(PAGES, SEED)
        region.actor.ask("madvise", region.address, PAGES, advice)
        return region

    return make


def locked(stage: Stage) -> Region:
    region = stage.start().region(PAGES, SEED)
    region.actor.ask("mlock", region.address, PAGES)
    return region


def userfault(stage: Stage) -> Region:
    region = stage.start().region(PAGES, SEED)
    region.actor.ask("userfault", region.address, PAGES)
    return region


def of_kind(kind: str) -> Callable[[Stage], Region]:
    return lambda stage: stage.start().region(PAGES, SEED, kind=kind)


def private_file(stage: Stage) -> Region:
    actor = stage.start()
    address = actor.map(PAGES, "file", Path(f"/tmp/actor-{actor.pid}"))
    region = Region(actor, address, PAGES, SEED)
    # Written to, its pages are anonymous; the mapping is a file's all the same.
    actor.ask("fill", address, PAGES, SEED)
    assert frames.has_flag(region[0].frame, frames.KPF_ANON)
    return region


def hugetlb(stage: Stage) -> Region:
    reserved = Path("/proc/sys/vm/nr_hugepages")
    reserved.write_text("2")
    assert reserved.read_text() == "2\n", "no memory for huge pages"
    return stage.start().region(512, SEED, kind="hugetlb")


MAPPINGS = {
    "MADV_DONTDUMP": advised(MADV_DONTDUMP),
    "MADV_WIPEONFORK": advised(MADV_WIPEONFORK),
    "mlock": locked,
    "userfaultfd": userfault,
    "shared": of_kind("shared"),
    "private memfd": of_kind("memfd"),
    "private file": private_file,
    "hugetlb": hugetlb,
}


@pytest.fixture
def no_huge_pages_left() -> Iterator[None]:
    """Gives back what a test has reserved."""
    yield
    Path("/proc/sys/vm/nr_hugepages").write_text("0")


@pytest.fixture
def good(stage: Stage) -> tuple[Region, Region]:
    """Two regions that merge, with which the refused one is equal."""
    return stage.start().region(PAGES, SEED), stage.start().region(PAGES, SEED)


def assert_refused(client: Client, good: tuple[Region, Region], bad: Region) -> None:
    """Not merged, and its neighbours are; the same when two such regions are among themselves."""
    before = bad.frames.tolist()
    for results in client.merge(*zip(*good, list(bad)[:PAGES], strict=True)):
        assert results == [Result.SUCCESS, Result.SUCCESS, Result.REFUSED]
    assert client.merge([bad[0], bad[1]]) == [[Result.REFUSED] * 2]
    assert bad.frames.tolist() == before
    for region in (*good, bad):
        region.verify()


@pytest.mark.usefixtures("no_huge_pages_left")
@pytest.mark.parametrize("kind", MAPPINGS)
def test_mapping(stage: Stage, client: Client, good: tuple[Region, Region], kind: str) -> None:
    bad = MAPPINGS[kind](stage)
    assert_refused(client, good, bad)
    runs = client.checksum(bad.actor.key, bad.address, bad.pages)
    assert [(run.address, run.refused_pages, len(run.records)) for run in runs] == [
        (bad.address, bad.pages, 0)
    ]


@pytest.mark.parametrize(
    ("undo", "kind"),
    [
        (("madvise", MADV_DODUMP), "MADV_DONTDUMP"),
        (("madvise", MADV_KEEPONFORK), "MADV_WIPEONFORK"),
        (("munlock",), "mlock"),
    ],
)
def test_mapping_that_is_no_longer_refused(
    stage: Stage, client: Client, good: tuple[Region, Region], undo: tuple[object, ...], kind: str
) -> None:
    """The same memory merges once the mark is gone: it was the mark that was refused."""
    region = MAPPINGS[kind](stage)
    assert_refused(client, good, region)
    region.actor.ask(undo[0], region.address, PAGES, *undo[1:])
    assert client.merge(*pairs(good[0], region)) == [[Result.ALREADYSH, Result.SUCCESS]] * PAGES
    region.verify()


def test_memory_set_aside(stage: Stage, client: Client, good: tuple[Region, Region]) -> None:
    """PROT_NONE: no access, so nobody can read what it holds, and nothing is merged behind that."""
    bad = stage.start().region(PAGES, SEED)
    bad.actor.ask("mprotect", bad.address, PAGES, PROT_NONE)
    before = bad.frames.tolist()
    for results in client.merge(*pairs(*good, bad)):
        assert results == [Result.SUCCESS, Result.SUCCESS, Result.REFUSED]
    assert bad.frames.tolist() == before
    bad.actor.ask("mprotect", bad.address, PAGES, PROT_READ | PROT_WRITE)
    assert bad.frames.tolist() == before
    bad.verify()
    assert client.merge(*pairs(good[0], bad)) == [[Result.ALREADYSH, Result.SUCCESS]] * PAGES
    write_privately(bad, 0, *good)


def test_kernels_own_mapping(client: Client, stage: Stage, good: tuple[Region, Region]) -> None:
    """[vdso] is mapped by the kernel, and not with memory of the process."""
    actor = stage.start()
    (line,) = (
        line
        for line in Path(f"/proc/{actor.pid}/maps").read_text().splitlines()
        if line.endswith("[vdso]")
    )
    page = Page(actor.key, int(line.split("-")[0], 16))
    assert client.merge([good[0][0], good[1][0], page])[0][2] is Result.REFUSED


def test_pages_of_ksm(stage: Stage, client: Client, good: tuple[Region, Region]) -> None:
    ksm = Path("/sys/kernel/mm/ksm")
    regions = [advised(MADV_MERGEABLE)(stage) for _ in range(2)]
    (ksm / "pages_to_scan").write_text("1000")
    (ksm / "run").write_text("1")
    try:
        # Mapped twice: a page mapped once is one that KSM may still give up.
        wait_until(
            lambda: all(
                frames.has_flag(page.frame, frames.KPF_KSM) and frames.map_count(page.frame) == 2
                for page in regions[0]
            ),
            "KSM has merged the pages",
        )
        (ksm / "run").write_text("0")
        assert_refused(client, good, regions[0])
        assert set(client.records(regions[0])["state"].tolist()) == {State.REFUSED}
        regions[1].verify()
    finally:
        (ksm / "run").write_text("2")


def assert_process_refused(client: Client, key: ProcessKey, address: int, number: int) -> None:
    for command in (client.checksum, client.unmerge):
        with pytest.raises(Refused) as refused:
            command(key, address, 1)
        assert refused.value.errno == number
        assert refused.value.text


def test_undumpable(stage: Stage, client: Client, good: tuple[Region, Region]) -> None:
    bad = stage.start().region(PAGES, SEED)
    bad.actor.ask("dumpable", 0)
    assert_refused(client, good, bad)
    assert_process_refused(client, bad.actor.key, bad.address, errno.EACCES)
    # A policy may name it all the same.
    assert set(flat(client.merge(*pairs(good[0], bad), undumpable=True))) == {
        Result.ALREADYSH,
        Result.SUCCESS,
    }
    write_privately(bad, 0, *good)


def test_undumpable_after_setuid(stage: Stage, client: Client) -> None:
    """A process that has changed its user without exec holds what only its old user may see."""
    bad = stage.start().region(PAGES, SEED)
    bad.actor.ask("setuid", 1001)
    good = stage.start(uid=1001).region(PAGES, SEED), stage.start(uid=1001).region(PAGES, SEED)
    assert_refused(client, good, bad)


def test_other_user(stage: Stage, module: Module) -> None:
    users = [stage.start(uid=uid).region(PAGES, SEED) for uid in (1001, 1001, 1002, 0)]
    with Client() as client:
        for results in client.merge(*pairs(*users)):
            assert results == [Result.SUCCESS] * 2 + [Result.DOMAIN] * 2
        assert not client.info().features & FEATURE_CROSS_UID
        for region in users:
            region.verify()
    with module.reloaded(allow_cross_uid=1), Client() as client:
        assert client.info().features & FEATURE_CROSS_UID
        for results in client.merge(*pairs(*users)):
            assert sorted(results) == [Result.SUCCESS] * 2 + [Result.ALREADYSH] * 2
        for group in pairs(*users):
            frames.assert_shared(group)
        write_privately(users[2], 0, users[0], users[1], users[3])


def test_kernel_thread(client: Client, good: tuple[Region, Region]) -> None:
    thread = ProcessKey(2, start_time_ticks(2))
    page = Page(thread, good[0].address)
    assert client.merge([*[region[0] for region in good], page])[0][2] is Result.NOTASK2
    assert_process_refused(client, thread, good[0].address, errno.ESRCH)


def test_dead_process(stage: Stage, client: Client) -> None:
    region = stage.start().region(1, SEED)
    region.actor.exit()
    assert client.merge([region[0], region[0]]) == [[Result.NOTASK1, Result.NOTASK2]]
    assert_process_refused(client, region.actor.key, region.address, errno.ESRCH)


def test_wrong_start_time(stage: Stage, client: Client, good: tuple[Region, Region]) -> None:
    """The pid of one who started a tick later is somebody else's."""
    bad = stage.start().region(PAGES, SEED)
    for wrong in (-1, 1):
        key = ProcessKey(bad.actor.pid, bad.actor.key.start_time_ticks + wrong)
        page = Page(key, bad.address)
        assert client.merge([good[0][0], good[1][0], page])[0][2] is Result.NOTASK2
        assert_process_refused(client, key, bad.address, errno.ESRCH)
    merge_all(client, *[bad.at(bad.address), stage.start().region(PAGES, SEED)])


def test_recycled_pid(stage: Stage, client: Client, good: tuple[Region, Region]) -> None:
    """A real one: the process ends, and another gets its pid."""
    old = stage.start().region(PAGES, SEED)
    old.actor.exit()

    def start_with_pid_of_old() -> bool:
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(old.actor.pid - 1))
        actor = stage.start()
        return actor.pid == old.actor.pid

    wait_until(start_with_pid_of_old, "a process has got the old one's pid")
    (actor,) = (actor for actor in stage.actors if actor.pid == old.actor.pid)
    assert actor.key != old.actor.key, "started within the same tick"
    new = actor.region(PAGES, SEED)
    stale = Page(old.actor.key, new.address)
    before = new.frames.tolist()
    assert client.merge([good[0][0], good[1][0], stale])[0][2] is Result.NOTASK2
    assert_process_refused(client, stale.process, new.address, errno.ESRCH)
    assert new.frames.tolist() == before
    merge_all(client, new, stage.start().region(PAGES, SEED))
