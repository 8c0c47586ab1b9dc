# SPDX-License-Identifier: MIT
"""The census against real processes whose every page is known, as root and as an ordinary user.

page        0 1 2 3 4 ...
process A   1 1 1 2 2 ...     equal numbers are equal bytes: see memory_process.py
process B   1 2 0 - ...       0: zeros that were written; -: the kernel's own page of zeros
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
import traceback
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergemem_agent import census, pagemap, tally
from mergemem_agent.census import Census, DomainCensus, Member
from mergemem_agent.error import MergememError, ProcessGone
from mergemem_agent.gap import Limit, Unread
from mergemem_agent.pagemap import FRAME_MASK, AddressSpace
from mergemem_agent.procfs import ProcessId
from mergemem_agent.shelf import Shelf

PROGRAM = Path(__file__).with_name("memory_process.py").read_text(encoding="utf-8")
NOBODY = 65534
ALL_SEEN = os.geteuid() == 0 and pagemap.frame_numbers_visible()

needs_frame_numbers = pytest.mark.skipif(
    not ALL_SEEN, reason="only CAP_SYS_ADMIN is shown frame numbers"
)


@dataclasses.dataclass
class Memory:
    """A running memory_process.py."""

    pids: list[int]
    address: int
    program: subprocess.Popen[str]

    def end(self) -> None:
        """Let the processes exit, and wait for all of them: they hold the same pipe."""
        assert self.program.stdin is not None
        assert self.program.stdout is not None
        self.program.stdin.close()
        self.program.stdout.read()
        self.program.wait()


class View:
    """A user who owns memory processes and takes the census of them; None: the test's own."""

    def __init__(self, uid: int | None) -> None:
        self.uid = uid
        self.started: list[Memory] = []

    def start(self, contents: Sequence[object], *options: str) -> Memory:
        """Start a memory process, and wait until its memory is there."""
        words = ",".join(map(str, contents))
        # Of the interpreter only the real path is sure to be open to another user.
        command = [os.path.realpath(sys.executable), "-I", "-c", PROGRAM, *options, "--", words]
        identity: dict[str, Any] = {}
        if self.uid is not None:
            identity = {"user": self.uid, "group": self.uid, "extra_groups": []}
        program = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", **identity
        )
        assert program.stdout is not None
        *pids, address = program.stdout.readline().split()
        self.started.append(Memory([int(pid) for pid in pids], int(address, 16), program))
        return self.started[-1]

    def take(self, selection: Sequence[Member], **options: Any) -> Census:
        """Take the census with what this user may see."""
        if self.uid is None:
            return census.take(selection, **options)
        # In a process of its own: a user who was changed cannot be changed back without traces.
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.setgroups([])
                os.setresgid(self.uid, self.uid, self.uid)
                os.setresuid(self.uid, self.uid, self.uid)
                with os.fdopen(writer, "wb") as pipe:
                    pickle.dump(census.take(selection, **options), pipe)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            data = pipe.read()
        assert os.waitpid(pid, 0)[1] == 0
        result = pickle.loads(data)
        assert isinstance(result, Census)
        return result

    def of(self, *memories: Memory, **options: Any) -> Census:
        """Take the census of all processes of `memories`."""
        pids = [pid for memory in memories for pid in memory.pids]
        return self.take(census.members(pids), **options)

    def end(self) -> None:
        """End all that were started."""
        for memory in self.started:
            memory.end()


@pytest.fixture(params=[pytest.param("all", marks=needs_frame_numbers), "user"])
def view(request: pytest.FixtureRequest) -> Iterator[View]:
    """See everything, then only what an ordinary user sees of the own processes."""
    view = View(NOBODY if request.param == "user" and os.geteuid() == 0 else None)
    yield view
    view.end()


@pytest.fixture
def full_view() -> Iterator[View]:
    """See everything; for tests that are marked with needs_frame_numbers, or need no numbers."""
    view = View(None)
    yield view
    view.end()


def only(result: Census) -> DomainCensus:
    """Return the one domain there is."""
    (domain,) = result.domains
    return domain


def test_counts_duplicates_within_and_between(view: View) -> None:
    # Within A: three more of 1, four more of 2. B repeats all five contents of A.
    a = view.start([1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 4, 5])
    b = view.start([5, 4, 3, 2, 1, 0, 0, 0, "-", "-"])
    domain = only(view.of(a, b))
    assert domain.tally.duplicates_within == 7
    assert domain.tally.duplicates_between == 5
    assert domain.tally.mergeable_duplicates == 12
    assert domain.tally.contents == 5
    assert domain.tally.zero == 3
    assert domain.zero_page_mappings == 2
    assert domain.tally.frames == domain.tally.mapped == 20
    assert domain.tally.ordinary == 17
    assert domain.tally.shared == domain.tally.saved == 0
    assert domain.pids == (*a.pids, *b.pids)


def test_unique_pages_are_no_duplicates(view: View) -> None:
    result = view.of(view.start(range(1, 20)), view.start(range(20, 40)))
    assert result.total.mergeable_duplicates == 0
    assert result.total.ordinary == result.total.contents == 39


def test_pages_shared_by_fork_are_one_frame(view: View) -> None:
    result = view.of(view.start([1, 2, 3, 4, 5, 6], "--forks", "2"))
    assert result.total.mapped == 18
    assert result.total.frames == result.total.shared == 6
    assert result.total.saved == 12
    assert result.total.mergeable_duplicates == 0


def test_broken_sharing_is_found(view: View) -> None:
    # Both children write to the first two pages: the same bytes as before, and new ones.
    fleet = view.start([1, 2, 3, 4], "--forks", "2", "--rewrite", "0=1", "--rewrite", "1=9")
    result = view.of(fleet)
    # Three frames of 1, one of 2, two of 9, one of 3, one of 4.
    assert result.total.frames == 8
    assert result.total.duplicates_between == 3
    assert result.total.shared == 2


@needs_frame_numbers
def test_a_frame_that_is_held_elsewhere_is_not_freed(full_view: View) -> None:
    # The children's page 0 becomes a copy of page 1, which the parent maps too.
    fleet = full_view.start([1, 2], "--forks", "2", "--rewrite", "0=2")
    children = census.take(census.members(fleet.pids[1:])).total
    assert children.frames == 3
    assert children.mergeable_duplicates == 1
    assert children.held_elsewhere == 1
    whole = census.take(census.members(fleet.pids)).total
    assert whole.mergeable_duplicates == 2
    assert whole.held_elsewhere == 0


def test_domains_do_not_share(view: View) -> None:
    a, b = view.start([1, 1, 2]), view.start([1, 2])
    members = census.members(a.pids + b.pids)
    together = view.take(members)
    assert together.total.mergeable_duplicates == 3
    apart = view.take(
        [dataclasses.replace(members[0], domain="a"), dataclasses.replace(members[1], domain="b")]
    )
    assert [domain.domain for domain in apart.domains] == ["a", "b"]
    assert [domain.tally.mergeable_duplicates for domain in apart.domains] == [1, 0]


def test_users_do_not_share_unless_the_module_allows_it(view: View) -> None:
    a, b = view.start([1, 2]), view.start([1, 2])
    ours, other = census.members(a.pids + b.pids)
    stranger = dataclasses.replace(other.process, uid=other.process.uid + 1)
    selection = [ours, dataclasses.replace(other, process=stranger)]
    assert len(view.take(selection).domains) == 2
    assert view.take(selection).total.mergeable_duplicates == 0
    allowed = only(view.take(selection, allow_cross_uid=True))
    assert allowed.uid is None
    assert allowed.tally.mergeable_duplicates == 2


@needs_frame_numbers
def test_a_frame_in_two_domains_counts_once(full_view: View) -> None:
    fleet = full_view.start([1, 2, 3], "--forks", "1")
    parent, child = census.members(fleet.pids)
    result = census.take(
        [dataclasses.replace(parent, domain="a"), dataclasses.replace(child, domain="b")]
    )
    assert [domain.tally.frames for domain in result.domains] == [3, 3]
    assert result.frames_in_several_domains == 3
    assert result.total.frames == 3


@needs_frame_numbers
def test_changes_no_frame_of_the_processes(full_view: View) -> None:
    # Reading by process_vm_readv(2) would give each process copies of its own here.
    fleet = full_view.start(["-", *range(1, 400)], "--forks", "1")

    def frames() -> list[list[int]]:
        found = []
        for pid in fleet.pids:
            with AddressSpace(pid) as space:
                found.append((space.entries(fleet.address, 400) & FRAME_MASK).tolist())
        return found

    before = frames()
    assert before[0] == before[1]
    assert 0 not in before[0]
    full_view.of(fleet)
    assert frames() == before


# Windows of pagemap end at page 8192, and from there on double while they are empty.
@pytest.mark.parametrize("reserved", [0, 8189, 8190, 8192 + 16384 - 1, 2 << 20])
def test_absent_pages_are_passed_over_and_stay_absent(view: View, reserved: int) -> None:
    memory = view.start([1, "x", 1, "x", "x", 2, 3], "--reserve-pages", str(reserved))
    domain = only(view.of(memory))
    assert domain.tally.mapped == 4
    assert domain.tally.duplicates_within == 1
    again = view.of(memory)
    assert only(again) == domain
    assert only(again).zero_page_mappings == 0
    assert {gap.reason for gap in again.gaps} == {Unread.REFUSED}


def test_refused_mappings_are_left_out_and_named(view: View) -> None:
    memory = view.start([1])
    gaps = [gap for gap in view.of(memory).gaps if gap.reason is Unread.REFUSED]
    # More than one where the C library keeps secrets of its own (glibc 2.41, on Linux 6.11).
    assert {gap.pid for gap in gaps} == set(memory.pids)
    assert "DONTDUMP" in gaps[0].detail
    assert gaps[0].pages > 100  # an interpreter


def test_processes_that_cannot_be_read_are_named(full_view: View) -> None:
    memory = full_view.start([1])
    (member,) = census.members(memory.pids)
    process = member.process
    recycled = ProcessId(process.id.pid, process.id.start_time_ticks + 1)
    thread = dataclasses.replace(process, kernel_thread=True)
    result = census.take([Member(dataclasses.replace(process, id=recycled), "a")])
    assert [gap.reason for gap in result.gaps] == [Unread.GONE]
    assert result.domains == ()
    result = census.take([Member(thread, "a")])
    assert [gap.reason for gap in result.gaps] == [Unread.KERNEL_THREAD]
    memory.end()
    result = census.take([member])
    assert [gap.reason for gap in result.gaps] == [Unread.GONE]


def test_an_undumpable_process_is_left_out_unless_included() -> None:
    view = View(NOBODY if os.geteuid() == 0 else None)
    try:
        (member,) = census.members(view.start([1, 1], "--undumpable").pids)
        # Looked at by the test itself, who may read it if root.
        result = census.take([member])
        assert [gap.reason for gap in result.gaps] == [Unread.NOT_DUMPABLE]
        included = census.take([dataclasses.replace(member, include_undumpable=True)])
        if os.geteuid() == 0:
            assert included.total.duplicates_within == 1
        else:
            assert [gap.reason for gap in included.gaps] == [Unread.DENIED]
    finally:
        view.end()


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to have two users")
def test_another_users_process_is_denied(full_view: View) -> None:
    memory = full_view.start([1])
    result = View(NOBODY).of(memory)
    assert [gap.reason for gap in result.gaps] == [Unread.DENIED]
    assert Limit.PROCESSES in result.limits


@needs_frame_numbers
def test_limits_follow_from_what_is_seen(full_view: View) -> None:
    assert full_view.of(full_view.start([1])).limits == frozenset()
    user = View(NOBODY)
    limits = user.of(user.start([1])).limits
    user.end()
    assert limits == {Limit.FRAME_NUMBERS, Limit.FRAME_FLAGS, Limit.MAPPING_COUNTS}


@needs_frame_numbers
@pytest.mark.skipif(
    "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii"),
    reason="transparent huge pages are switched off",
)
def test_huge_pages_are_counted_apart(full_view: View) -> None:
    contents = [1, 1, 2, 0, *range(3, 511)]  # a huge page whole
    memory = full_view.start(contents, "--huge")
    rollup = Path(f"/proc/{memory.pids[0]}/smaps").read_text(encoding="utf-8")
    if "AnonHugePages:      2048 kB" not in rollup:
        pytest.skip("the kernel found no huge page just now")
    total = full_view.of(memory).total
    assert total.huge == 512
    assert total.huge_duplicates == 1
    assert total.mergeable_duplicates == total.zero == total.ordinary == 0


def test_a_sample_keeps_equal_pages_together(view: View) -> None:
    contents = [*range(1, 1001), *range(1, 1001), 0, 0, 0]
    domain = only(view.of(view.start(contents), sample=0.5))
    # Each content twice: whatever is drawn, half of the frames are duplicates.
    assert domain.tally.duplicates_within == domain.tally.contents
    assert domain.tally.zero == 3
    assert domain.tally.mapped == domain.tally.frames == 2 * domain.tally.contents + 3
    # 500 of 1,000 are drawn, with a standard deviation of 15.8, which is 31.6 extrapolated.
    assert 40 < domain.error_duplicates < 85
    assert abs(domain.tally.duplicates_within - 1000) < 6 * 31.7


def test_a_wrong_sample_is_refused() -> None:
    for sample in (0.0, -0.1, 1.01):
        with pytest.raises(MergememError, match="sample"):
            census.take([], sample=sample)


def test_an_unknown_pid_is_refused() -> None:
    with pytest.raises(ProcessGone, match="no process"):
        census.members([2**22 + 1])


def test_progress_reaches_what_was_read(full_view: View) -> None:
    calls: list[tuple[int, int]] = []
    memory = full_view.start(range(1, 601))
    full_view.of(memory, progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == 600 * 4096
    assert len(calls) == 3  # never more than 1 MiB at a time


def test_records_take_24_bytes_a_page() -> None:
    pages = 100_000
    tracemalloc.start()
    shelf = Shelf()
    for start in range(0, pages, 250):
        numbers = np.arange(start, start + 250, dtype=np.uint64)
        exclusive = np.ones(250, dtype=np.bool_)
        shelf.put(
            tally.pack(numbers, numbers, numbers, 7, exclusive, np.zeros(250, dtype=np.uint8))
        )
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 24 * pages <= held < 25 * pages


def test_counting_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    shelf = Shelf()
    for process in range(5):
        low = generator.integers(0, 300, 400).astype(np.uint64) << np.uint64(32)
        high = (low != 0).astype(np.uint64)
        frames = np.arange(400, dtype=np.uint64) + np.uint64(400 * process)
        exclusive = np.ones(400, dtype=np.bool_)
        shelf.put(tally.pack(low, high, frames, process, exclusive, np.zeros(400, np.uint8)))
    whole = shelf.count(None)
    monkeypatch.setattr("mergemem_agent.shelf.PART_PAGES", 100)
    assert shelf.count(None) == whole
    assert whole[1].mergeable_duplicates > 1000
