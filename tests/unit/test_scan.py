# SPDX-License-Identifier: MIT
"""Targets and scan queue, on real processes of this machine and the real /proc."""

import math
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from mergemem_agent import order, scan, schedule
from mergemem_agent.hint import Hint
from mergemem_agent.order import BATCH_REGIONS, SLICE_REGIONS, Slice
from mergemem_agent.policy import Glob, Policy, PolicySet, Selector
from mergemem_agent.procfs import Mapping, ProcessId, ProcFs
from mergemem_agent.region import REGION_BYTES
from mergemem_agent.scan import (
    IDLE_SHARE,
    MAPPINGS_HINT_SECONDS,
    MAPPINGS_SECONDS,
    ScanQueue,
    region_numbers,
)
from mergemem_agent.schedule import MAX_HINTS
from mergemem_agent.targets import Target, Targets
from mergemem_agent.window import Look
from tests.unit.sleeper import SLEEPER

SLEEPERS = PolicySet(policies=(Policy(name="sleepers", select=Selector(executable=Glob(SLEEPER))),))
NOBODY = PolicySet()


@pytest.fixture(autouse=True)
def grown_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scan processes however young they are; test_storm.py is about these."""
    monkeypatch.setattr(scan, "YOUNG_SECONDS", 0.0)


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started = [subprocess.Popen([SLEEPER, "600"]) for _ in range(2)]
    yield started
    for process in started:
        process.kill()
        process.wait()


def pids(targets: Targets) -> set[int]:
    return {target.process.pid for target in targets}


def sync_until(targets: Targets, expected: set[int]) -> None:
    """Sync until all of these are targets: a new process may still be before its exec."""
    deadline = time.monotonic() + 20
    targets.sync()
    while not expected <= pids(targets) and time.monotonic() < deadline:
        time.sleep(0.1)
        targets.sync()
    assert expected <= pids(targets)


def queue_of(targets: Targets) -> ScanQueue:
    """Return a queue that knows the mappings of all targets."""
    queue = ScanQueue(targets, ProcFs())
    queue.follow()
    while queue.read_mappings(lambda _: True):
        pass
    return queue


def batches(queue: ScanQueue) -> Iterator[list[Slice]]:
    """Yield all that is due, once."""
    while batch := queue.next(lambda _: True, seconds=lambda _: 10.0):
        yield batch
        for work in batch:
            rows = work.target.regions.rows[work.first : work.first + work.count]
            rows["due"] = rows["sample"] = time.monotonic() + 1000
            work.target.regions.changed()


def mapping(start: int, end: int, permissions: str = "rw-p", inode: int = 0) -> Mapping:
    return Mapping(start, end, permissions, inode, "", frozenset())


def test_targets_follow_proc(sleepers: list[subprocess.Popen[bytes]]) -> None:
    targets = Targets(SLEEPERS, ProcFs())
    sync_until(targets, {process.pid for process in sleepers})
    sleepers[0].kill()
    sleepers[0].wait()
    targets.sync()
    assert sleepers[0].pid not in pids(targets)
    assert sleepers[1].pid in pids(targets)


def test_the_agent_is_never_its_own_target() -> None:
    own = Glob(os.path.realpath("/proc/self/exe"))
    targets = Targets(PolicySet(policies=(Policy("own", Selector(executable=own)),)), ProcFs())
    code = "import time; print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as sibling:
        assert sibling.stdout is not None
        sibling.stdout.readline()
        sync_until(targets, {sibling.pid})
        sibling.kill()
    assert os.getpid() not in pids(targets)


def test_a_target_stays_one_when_its_memory_is_no_longer_anonymous() -> None:
    code = (
        "memory = bytearray(b'x') * (64 << 20); print(flush=True); input();"
        "del memory; print(flush=True); input()"
    )
    large = Selector(
        executable=Glob(os.path.realpath(sys.executable)), minimum_anonymous_bytes=32 << 20
    )
    policies = PolicySet(policies=(Policy("large", large),))
    targets = Targets(policies, ProcFs())
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        sync_until(targets, {process.pid})
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        assert (seen := ProcFs().process(process.pid)) is not None
        assert not large.matches(seen)
        targets.change_policies(policies)
        targets.sync()
        assert process.pid in pids(targets)
        process.kill()


def test_other_policies_make_other_targets(sleepers: list[subprocess.Popen[bytes]]) -> None:
    targets = Targets(SLEEPERS, ProcFs())
    sync_until(targets, {process.pid for process in sleepers})
    targets.change_policies(NOBODY)
    targets.sync()
    assert len(targets) == 0


def test_a_target_keeps_what_is_known_of_it(sleepers: list[subprocess.Popen[bytes]]) -> None:
    targets = Targets(SLEEPERS, ProcFs())
    sync_until(targets, {process.pid for process in sleepers})
    before = list(targets)
    targets.change_policies(SLEEPERS)
    targets.sync()
    assert all(target in targets for target in before)


def test_a_refused_process_is_left_alone(sleepers: list[subprocess.Popen[bytes]]) -> None:
    targets = Targets(SLEEPERS, ProcFs())
    sync_until(targets, {process.pid for process in sleepers})
    target = next(target for target in targets if target.process.pid == sleepers[0].pid)
    targets.refuse(target)
    targets.sync()
    assert sleepers[0].pid not in pids(targets)


def test_mappings_are_read_again_at_common_times(
    sleepers: list[subprocess.Popen[bytes]],
) -> None:
    """Each time costs a wake, if nothing else is to be done."""
    targets = Targets(SLEEPERS, ProcFs())
    sync_until(targets, {process.pid for process in sleepers})
    queue = queue_of(targets)
    due = []
    for number, tracked in enumerate(queue._tracked.values()):
        now = 1000.1 + number
        tracked.interval = MAPPINGS_SECONDS  # and the mappings are as they were
        queue._read_mappings(tracked, now)
        assert 2 * MAPPINGS_SECONDS <= tracked.target.mapped - now <= 2.5 * MAPPINGS_SECONDS
        due.append(tracked.target.mapped)
    assert len(due) > 1
    assert len(set(due)) == 1


def test_every_region_comes_once(
    sleepers: list[subprocess.Popen[bytes]],
) -> None:
    targets = Targets(SLEEPERS, ProcFs())
    sync_until(targets, {process.pid for process in sleepers})
    queue = queue_of(targets)
    handed_out: dict[int, list[int]] = {target.process.pid: [] for target in targets}
    batches = 0
    while batch := queue.next(lambda _: True, seconds=lambda _: 10.0):
        batches += 1
        assert sum(work.count for work in batch) <= BATCH_REGIONS
        assert all(work.goes_with(batch[0]) for work in batch)
        for work in batch:
            rows = work.target.regions.rows[work.first : work.first + work.count]
            assert 1 <= work.count <= SLICE_REGIONS
            assert (np.diff(rows["number"].astype(int)) == 1).all()
            handed_out[work.target.process.pid] += rows["number"].tolist()
            rows["due"] = rows["sample"] = time.monotonic() + 1000
    assert batches == 1  # both processes share, and have little memory
    for target in targets:
        expected = region_numbers(ProcFs().mappings(target.process.pid)).tolist()
        assert sorted(handed_out[target.process.pid]) == expected
    assert queue.state().due == 0
    assert queue.state().regions == sum(map(len, handed_out.values()))


def test_targets_without_budget_wait(sleepers: list[subprocess.Popen[bytes]]) -> None:
    targets = Targets(SLEEPERS, ProcFs())
    sync_until(targets, {process.pid for process in sleepers})
    queue = queue_of(targets)
    assert queue.next(lambda _: False) == []
    only = sleepers[1].pid
    batch = queue.next(lambda target: target.process.pid == only, seconds=lambda _: 10.0)
    assert {work.target.process.pid for work in batch} == {only}


def test_a_batch_takes_no_longer_than_it_should(sleepers: list[subprocess.Popen[bytes]]) -> None:
    targets = Targets(SLEEPERS, ProcFs())
    sync_until(targets, {process.pid for process in sleepers})
    queue = queue_of(targets)
    queue.costs.region = 1.0  # CPU second each
    sizes = []
    while batch := queue.next(lambda _: True, seconds=lambda _: 2.5):
        sizes.append(sum(work.count for work in batch))
        assert len(batch) == 1 or sum(work.cost_seconds for work in batch) <= 2.5
        for work in batch:
            rows = work.target.regions.rows[work.first : work.first + work.count]
            rows["due"] = rows["sample"] = time.monotonic() + 1000
    assert len(sizes) > 1


def test_a_batch_is_of_one_domain(sleepers: list[subprocess.Popen[bytes]]) -> None:
    """Processes that do not share are looked at apart."""
    targets = Targets(SLEEPERS, ProcFs())
    sync_until(targets, {process.pid for process in sleepers})
    alone, other = targets
    alone.domain = "its own"
    domains = [{work.target.domain for work in batch} for batch in batches(queue_of(targets))]
    assert sorted(domains, key=min) == sorted([{"its own"}, {other.domain}], key=min)


def test_samples_and_full_checksums_are_taken_in_one_look(
    sleepers: list[subprocess.Popen[bytes]],
) -> None:
    targets = Targets(SLEEPERS, ProcFs())
    sync_until(targets, {process.pid for process in sleepers})
    queue = queue_of(targets)
    target, other = targets
    other.regions.replace(np.zeros(0, dtype=np.uint64))
    rows = target.regions.rows
    rows["sample"][1::2] = time.monotonic() + 1000
    rows["looks"] = 1
    rows["first"] = rows["pages"] = 100
    sampled = rows["sample"] <= time.monotonic()
    (batch,) = batches(queue)
    for work in batch:
        assert {work.sampled} == set(sampled[work.first : work.first + work.count].tolist())
    assert {work.sampled for work in batch} == {True, False}


def test_looks_that_promise_nothing_take_a_small_share(
    sleepers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They rest after each for as long as it took, and many times more; others need not wait."""
    targets = Targets(SLEEPERS, ProcFs())
    sync_until(targets, {process.pid for process in sleepers})
    queue = queue_of(targets)
    monkeypatch.setattr(order, "WORTH_PAGES", 1e12)

    def anybody(target: Target) -> bool:
        del target
        return True

    (work, *_) = queue.next(anybody)
    assert not work.worth
    nothing = Look(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    queue.learn([work], nothing, cpu_seconds=10 * IDLE_SHARE)
    assert queue.next(anybody, seconds=lambda _: 10.0) == []
    assert 5 < queue.wait_seconds(time.monotonic(), lambda _: 0.0) <= 10
    assert not queue.due_in(work.target.pool)
    monkeypatch.setattr(order, "WORTH_PAGES", 0.0)
    queue._plan_ends = 0.0
    assert queue.next(anybody)
    assert queue.due_in(work.target.pool)


@pytest.mark.parametrize(("worth_pages", "regions"), [(0.0, BATCH_REGIONS), (1e12, SLICE_REGIONS)])
def test_what_promises_nothing_is_done_little_by_little(
    sleepers: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    worth_pages: float,
    regions: int,
) -> None:
    targets = Targets(SLEEPERS, ProcFs())
    sync_until(targets, {process.pid for process in sleepers})
    queue = queue_of(targets)
    for target in targets:
        target.regions.replace(np.arange(1000, 1000 + 2 * BATCH_REGIONS, dtype=np.uint64))
    monkeypatch.setattr(order, "WORTH_PAGES", worth_pages)
    batch = queue.next(lambda _: True, seconds=lambda _: 1000.0)
    assert sum(work.count for work in batch) == regions


def test_a_search_has_to_promise_as_much_as_a_look() -> None:
    queue = ScanQueue(Targets(NOBODY, ProcFs()), ProcFs())
    pages, cost_seconds = 10**6, 10**6 * queue.costs.search
    enough = math.ceil(order.WORTH_PAGES * cost_seconds)
    assert queue.search_rest_seconds(pages, enough) == 0
    rest = queue.search_rest_seconds(pages, enough - 1)
    assert rest == pytest.approx(cost_seconds / IDLE_SHARE)
    assert queue.search_rest_seconds(10**9, 1) == schedule.NEGLECT_SECONDS


def test_a_process_that_ends_in_the_queue_is_dropped(
    sleepers: list[subprocess.Popen[bytes]],
) -> None:
    targets = Targets(SLEEPERS, ProcFs())
    sync_until(targets, {process.pid for process in sleepers})
    for process in sleepers:
        process.kill()
        process.wait()
    queue = queue_of(targets)
    mine = {process.pid for process in sleepers}
    assert not mine & pids(targets)
    assert queue.next(lambda target: target.process.pid in mine) == []
    assert {regions.rows.size for regions in queue.follow()} == {0}


def test_hints_bring_a_region_forward_or_put_it_off(
    sleepers: list[subprocess.Popen[bytes]],
) -> None:
    targets = Targets(SLEEPERS, ProcFs())
    sync_until(targets, {sleepers[0].pid})
    queue = queue_of(targets)
    (work,) = queue.next(lambda target: target.process.pid == sleepers[0].pid)
    rows = work.target.regions.rows
    process, address = work.target.process, int(rows["number"][0]) * REGION_BYTES
    now = time.monotonic()
    rows["sample"] = rows["due"] = now + 1000
    rows["news"] = 0.25
    queue.take_hints([Hint(process, address, first_touches=100, write_protect_faults=0)])
    assert now + 9 < rows["due"][0] < now + 100
    assert rows["news"].tolist() == [100.0, *[0.25] * (len(rows) - 1)]
    queue.take_hints([Hint(process, address, first_touches=0, write_protect_faults=100)])
    assert now + 19 < rows["due"][0] < now + 100
    # Nobody knows of memory there: so the mappings are read again soon.
    queue.take_hints([Hint(process, 0, first_touches=1, write_protect_faults=0)])
    assert work.target.mapped <= time.monotonic() + MAPPINGS_HINT_SECONDS
    queue.take_hints([Hint(ProcessId(1, 1), 0, first_touches=1, write_protect_faults=0)])
    assert queue.state().hints == {"region": 2, "mapping": 1, "process": 1}


def test_hints_do_not_put_off_a_region_for_ever(sleepers: list[subprocess.Popen[bytes]]) -> None:
    targets = Targets(SLEEPERS, ProcFs())
    sync_until(targets, {sleepers[0].pid})
    queue = queue_of(targets)
    (work,) = queue.next(lambda target: target.process.pid == sleepers[0].pid)
    rows = work.target.regions.rows
    hint = Hint(work.target.process, int(rows["number"][0]) * REGION_BYTES, 1, 0)
    queue.take_hints([hint] * MAX_HINTS)
    before = float(rows["due"][0])
    queue.take_hints([hint, hint])
    assert rows["due"][0] == before
    assert queue.state().hints == {"region": MAX_HINTS, "late": 2}


def test_regions_of_mappings() -> None:
    numbers = region_numbers(
        [
            mapping(0x1000, 0x2000),
            mapping(0x3FF000, 0x401000),  # across a border
            mapping(0x800000, 0x801000, inode=5),  # a file
            mapping(0xA00000, 0xB00000, permissions="---p"),  # a reservation
            mapping(0xC00000, 0xE00000),  # one region, exactly
        ]
    )
    assert numbers.tolist() == [0, 1, 2, 6]
    assert region_numbers([]).tolist() == []


def test_own_memory_is_in_a_region() -> None:
    memory = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    assert address // REGION_BYTES in region_numbers(ProcFs().mappings(os.getpid())).tolist()
