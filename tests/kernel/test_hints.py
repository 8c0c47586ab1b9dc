# SPDX-License-Identifier: MIT
"""Hints and events out of the kernel: exact counts, exact losses, and what becomes of them.

One program serves all tests, since compiling it takes the longest. Its maps are tiny, so that they
overflow when a test wants that.
"""

from __future__ import annotations

import mmap
import os
import re
import select
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from mergemem_agent import agent as service
from mergemem_agent.hint import Hint, ProcessEvents, SourceKind
from mergemem_agent.hint_program import HintProgram, give_memory_back
from mergemem_agent.hint_source import BpfHints
from mergemem_agent.notify import Notifier
from mergemem_agent.policy import Glob, Policy, PolicySet, Selector
from mergemem_agent.policy_file import load
from mergemem_agent.procfs import ProcessId, ProcFs
from mergemem_agent.targets import MAX_WAITING, Target, Targets
from tests.kernel.actor import PAGE_BYTES, PROGRAM, Actor, Stage
from tests.kernel.agent import CHECKOUT, Agent
from tests.kernel.sharing import wait_until

REGION_PAGES = 512
REGIONS = 256
EVENT_BYTES = 16  # one in the ring buffer, with its header
EVENTS = PAGE_BYTES // EVENT_BYTES

ACTORS = PolicySet(policies=(Policy("actors", Selector(executable=Glob(str(PROGRAM)))),))


# select() looks once more when its time is over, so whoever was not woken is told of an event then.
WAKE_LIMIT_SECONDS = 30.0

# To end the waiting for an event that does not come.
EVENT_LIMIT_SECONDS = 20.0


@pytest.fixture(scope="module")
def program() -> Iterator[HintProgram]:
    program = compiled()
    yield program
    program.close()


def compiled() -> HintProgram:
    """A program that counts every fault in few regions."""
    program = HintProgram(regions=REGIONS, event_pages=1, sampling_bits=0)
    # Pages of libraries that two processes map stay where they are: the agent's measure is spoilt.
    give_memory_back()
    program.count_faults(SourceKind.BPF)
    return program


@pytest.fixture
def source(program: HintProgram) -> BpfHints:
    return fresh(program, sampling=1)


def fresh(program: HintProgram, sampling: int) -> BpfHints:
    """A source that has nothing of what other tests left."""
    source = BpfHints(program, sampling=sampling, drain_seconds=0)
    source.events()
    return source


def process_of(actor: Actor) -> ProcessId:
    return ProcessId(actor.pid, actor.key.start_time_ticks)


def drained(source: BpfHints, *actors: Actor) -> dict[tuple[int, int], Hint]:
    """All hints there are, by process and address."""
    hints = source.hints([process_of(actor) for actor in actors])
    found = {(hint.process.pid, hint.address): hint for hint in hints}
    assert len(found) == len(hints)
    return found


def lost(source: BpfHints) -> dict[str, int]:
    return {reason: count for reason, count in source.state().lost.items() if count}


# ---- faults ----


def test_every_fault_is_counted(stage: Stage, source: BpfHints) -> None:
    alice = stage.start()
    area = alice.map(REGION_PAGES)
    drained(source, alice)
    alice.ask("write", area, 1, 23)
    hint = drained(source, alice)[alice.pid, area]
    assert (hint.first_touches, hint.write_protect_faults) == (23, 0)
    alice.ask("write", area, 1, 29)  # six more
    alice.fork()
    alice.ask("write", area, 2, 29)
    hint = drained(source, alice)[alice.pid, area]
    assert (hint.first_touches, hint.write_protect_faults) == (6, 29)
    assert (alice.pid, area) not in drained(source, alice)
    assert not lost(source)


def test_faults_of_the_kernel_for_a_process_are_counted(source: BpfHints) -> None:
    # read() into new memory, as weights are loaded: the kernel takes the faults.
    me = ProcFs().process(os.getpid())
    assert me
    with mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        source.hints([me.id])
        descriptor = os.open("/proc/self/exe", os.O_RDONLY)
        with memoryview(area)[: 23 * PAGE_BYTES] as buffer:
            assert os.readv(descriptor, [buffer]) == 23 * PAGE_BYTES
        os.close(descriptor)
        touches = max(hint.first_touches for hint in source.hints([me.id]))
    assert 23 <= touches <= 40  # and whatever else Python touched there


def test_others_are_not_counted(stage: Stage, source: BpfHints) -> None:
    alice, bob = stage.start(), stage.start()
    areas = [actor.map(REGION_PAGES) for actor in (alice, bob)]
    drained(source, alice)
    for actor, area in zip((alice, bob), areas, strict=True):
        actor.ask("write", area, 1, 23)
    found = drained(source, alice)
    assert found[alice.pid, areas[0]].first_touches == 23
    assert {pid for pid, _ in found} == {alice.pid}
    assert not drained(source, alice, bob)
    assert not lost(source)  # they took no room in the map either


@pytest.mark.parametrize("sampling", [8, 64])
def test_sampling_is_multiplied_again(stage: Stage, program: HintProgram, sampling: int) -> None:
    source = fresh(program, sampling)
    alice = stage.start()
    area = alice.map(4 * REGION_PAGES)
    drained(source, alice)
    before = program.totals.read(0)["sampled"].sum()
    alice.ask("write", area, 1, 4 * REGION_PAGES)
    sampled = program.totals.read(0)["sampled"].sum() - before
    found = drained(source, alice)
    for region in range(4):
        hint = found[alice.pid, area + (region << 21)]
        assert hint.first_touches % sampling == 0
        # Neighbouring pages are sampled evenly: off by three of them at most.
        assert abs(hint.first_touches - REGION_PAGES) <= 3 * sampling
    assert sampled <= 2 * 4 * REGION_PAGES / sampling


def test_regions_without_room_are_counted_as_lost(stage: Stage, source: BpfHints) -> None:
    touched = 6 * REGIONS
    alice = stage.start()
    area = alice.map(touched * REGION_PAGES)
    drained(source, alice)
    alice.ask("flip", area, touched * REGION_PAGES, REGION_PAGES)
    found = drained(source, alice)
    # It reads before it writes, so its write is the fault that takes it from the zero page.
    told = sum(hint.write_protect_faults for hint in found.values() if hint.address >= area)
    missing = lost(source)
    assert 0 < told <= REGIONS
    assert missing.pop("evicted") + missing.pop("map_full", 0) >= touched - told
    assert not missing
    # Nothing is counted as lost twice.
    before = lost(source)
    alice.ask("write", area, 1, 23)
    assert drained(source, alice)[alice.pid, area].first_touches == 22
    assert lost(source) == before


def test_regions_that_a_map_refuses_are_counted_as_lost(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An LRU map refuses an entry too seldom to wait for, so this one gives up none for another."""
    sources = tmp_path / "bpf"
    shutil.copytree(CHECKOUT / "bpf", sources)
    code = (sources / "hints.c").read_text()
    assert code.count('"lru_percpu_hash"') == 2
    (sources / "hints.c").write_text(code.replace('"lru_percpu_hash"', '"percpu_hash"'))
    monkeypatch.setattr("mergemem_agent.hint_program.source_directory", lambda: sources)
    program = compiled()
    try:
        source = fresh(program, sampling=1)
        alice = stage.start()
        area = alice.map(2 * REGIONS * REGION_PAGES)
        drained(source, alice)
        alice.ask("flip", area, 2 * REGIONS * REGION_PAGES, REGION_PAGES)
        found = drained(source, alice)
        assert len(found) == REGIONS
        told = sum(hint.write_protect_faults for hint in found.values() if hint.address >= area)
        assert lost(source) == {"map_full": 2 * REGIONS - told}
    finally:
        program.close()


def test_without_the_tracepoint_all_faults_are_first_touches(
    stage: Stage, program: HintProgram
) -> None:
    program.stop_counting()
    program.count_faults(SourceKind.PERF, perf_sampling=1)
    try:
        source = fresh(program, sampling=1)
        alice = stage.start()
        area = alice.map(REGION_PAGES)
        drained(source, alice)
        alice.ask("write", area, 1, 29)
        alice.fork()
        alice.ask("write", area, 2, 23)
        hint = drained(source, alice)[alice.pid, area]
        assert (hint.first_touches, hint.write_protect_faults) == (29 + 23, 0)
        assert source.state().source is SourceKind.PERF
    finally:
        program.stop_counting()
        program.count_faults(SourceKind.BPF)


# ---- events ----


class Follower:
    """Targets that follow events, and read /proc as a whole only when they must."""

    def __init__(self, source: BpfHints, policies: PolicySet = ACTORS) -> None:
        self.source = source
        self.targets = Targets(policies, ProcFs())
        self.targets.sync()

    def follow(self) -> None:
        self.targets.take_events(self.source.events())
        self.source.hints(target.process for target in self.targets)

    @property
    def pids(self) -> set[int]:
        return {target.process.pid for target in self.targets}

    def until(self, condition: Callable[[], bool], what: str) -> None:
        def follow() -> bool:
            self.follow()
            return condition()

        wait_until(follow, what)


def test_processes_come_and_go_by_events(stage: Stage, source: BpfHints) -> None:
    follower = Follower(source)
    alice = stage.start()  # by exec
    follower.until(lambda: follower.pids == {alice.pid}, "the newcomer is a target")
    bob = alice.fork()
    follower.until(lambda: follower.pids == {alice.pid, bob.pid}, "the child is one")
    (known,) = [target for target in follower.targets if target.process.pid == alice.pid]
    alice = alice.exec()
    follower.until(lambda: known not in follower.targets, "what was known of it is forgotten")
    follower.until(lambda: follower.pids == {alice.pid, bob.pid}, "it is one again")
    bob.exit()
    events = source.events()
    assert events.ended == {bob.pid}
    follower.targets.take_events(events)
    assert follower.pids == {alice.pid}
    follower.follow()
    assert lost(source).keys() <= {"gone"}  # what it did before it ended


def assert_wakes(source: BpfHints, cause: Callable[[], object]) -> None:
    """Else it is only found by the next look around, which here is half a minute away."""

    def waited() -> tuple[bool, float]:
        started = time.monotonic()
        ready = select.select([source.descriptor()], [], [], WAKE_LIMIT_SECONDS)[0]
        return bool(ready), time.monotonic() - started

    with ThreadPoolExecutor() as waiter:
        found = waiter.submit(waited)
        time.sleep(1)
        cause()
    ready, seconds = found.result()
    assert ready
    assert seconds < WAKE_LIMIT_SECONDS / 2


def is_awake(source: BpfHints) -> bool:
    return bool(select.select([source.descriptor()], [], [], 0)[0])


def test_an_event_wakes_whoever_waits_for_it(stage: Stage, source: BpfHints) -> None:
    source.events()
    for _ in range(2):  # the second time, after the buffer was emptied
        assert_wakes(source, stage.start)
        assert source.events().executed
        assert not is_awake(source)


def test_a_hint_wakes_whoever_has_asked_for_it(stage: Stage, source: BpfHints) -> None:
    alice, bob = stage.start(), stage.start()
    areas = [actor.map(REGION_PAGES) for actor in (alice, bob)]
    drained(source, alice)
    source.events()
    seen = source.state().events
    alice.ask("write", areas[0], 1, 7)
    assert not is_awake(source), "nobody has asked"
    for number in range(1, 3):
        drained(source, alice)
        source.wake_for_hints()
        bob.ask("write", areas[1] + number * PAGE_BYTES, 1, 1)
        assert not is_awake(source), "of bob there are no hints"
        area = areas[0] + number * 16 * PAGE_BYTES
        assert_wakes(source, partial(alice.ask, "write", area, 1, 7))
        assert source.has_hints()
        assert source.events() == ProcessEvents(), "it is no event of a process"
        alice.ask("write", area + 8 * PAGE_BYTES, 1, 1)
        assert not is_awake(source), "once is enough"
    source.wake_for_hints()
    drained(source, alice)
    alice.ask("write", areas[0] + 100 * PAGE_BYTES, 1, 1)
    assert not is_awake(source), "a drain ends it"
    assert source.state().events == seen
    assert not lost(source)


def test_the_young_are_looked_at_again(stage: Stage, source: BpfHints) -> None:
    grown = Selector(executable=Glob(str(PROGRAM)), minimum_anonymous_bytes=64 * PAGE_BYTES)
    follower = Follower(source, PolicySet(policies=(Policy("grown", grown),)))
    alice = stage.start()
    follower.until(lambda: not follower.targets.waiting, "it has been looked at")
    assert not follower.pids
    alice.region(128, seed=1)
    follower.until(lambda: follower.pids == {alice.pid}, "it has grown into the policy")


def test_threads_are_no_processes(source: BpfHints) -> None:
    me = ProcFs().process(os.getpid())
    assert me
    source.watch([me.id])
    thread = threading.Thread(target=lambda: None)
    thread.start()
    identity = thread.native_id
    thread.join()
    assert identity
    wait_until(lambda: not Path(f"/proc/self/task/{identity}").exists(), "the thread has ended")
    events = source.events()
    assert not {identity, me.id.pid} & (events.forked | events.executed | events.ended)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    events = source.events()
    assert child in events.forked
    assert child not in events.ended  # nobody's target


def test_lost_events_are_made_up_for(stage: Stage, source: BpfHints) -> None:
    follower = Follower(source)
    alice = stage.start()
    follower.until(lambda: follower.pids == {alice.pid}, "alice is a target")
    alice.ask("spawn", EVENTS + 100, EVENTS + 100, 0)  # nobody reads the buffer meanwhile
    bob = alice.fork()
    events = source.events()
    assert not events.complete
    assert bob.pid not in events.forked
    assert lost(source)["events"] >= 100
    follower.targets.take_events(events)
    assert follower.pids == {alice.pid, bob.pid}
    assert source.events().complete


def test_a_storm_of_forks_leaves_nothing_behind(stage: Stage, source: BpfHints) -> None:
    follower = Follower(source)
    alice = stage.start()
    follower.until(lambda: follower.pids == {alice.pid}, "alice is a target")
    asked = threading.Thread(target=alice.ask, args=("spawn", 2000, 100, 1500))
    asked.start()
    most = seen = 0
    while asked.is_alive():
        follower.follow()
        most, seen = max(most, follower.targets.waiting), max(seen, len(follower.targets))
        asked.join(0.05)
    assert seen > 1, "no child was ever a target"
    assert most <= MAX_WAITING
    follower.until(lambda: follower.pids == {alice.pid}, "all of the children are forgotten")
    follower.until(lambda: not follower.targets.waiting, "nobody is waited for")


# ---- the agent ----

POLICIES = """
policies:
  - name: actors
    select: {executable: "**/build/actor"}
    settle: "300ms"
"""


def only(*capabilities: str) -> list[str]:
    """What runs a command with these alone."""
    names = "".join(f",+{name.removeprefix('CAP_').lower()}" for name in capabilities)
    return ["setpriv", f"--bounding-set=-all{names}", "--"]


def of_unit() -> list[str]:
    """The capabilities that the agent's systemd unit leaves it."""
    unit = (CHECKOUT / "deploy/mergemem.service").read_text()
    (line,) = re.findall(r"^CapabilityBoundingSet=(.+)$", unit, re.MULTILINE)
    return str(line).split()


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    (kib,) = re.findall(r"^VmRSS:\s*(\d+) kB$", status, re.MULTILINE)
    return int(kib) << 10


def test_the_agent_has_hints(stage: Stage, tmp_path: Path) -> None:
    # Rarely enough that nobody is ever found in /proc.
    agent = Agent(tmp_path, POLICIES, hints="auto", rescan="1h", prefix=only(*of_unit()))
    with agent:
        wait_until(lambda: 'mergemem_hints_source{source="bpf"}' in agent.metrics(), "BPF is there")
        wait_until(lambda: "mergemem_scan_queue_regions" in agent.metrics(), "it has begun")
        alice, bob = (stage.start().region(600, seed=7) for _ in range(2))

        def targets(count: int) -> None:
            name = 'mergemem_targets{policy="actors"}'
            wait_until(lambda: agent.metrics().get(name) == count, f"{count} targets")

        targets(2)
        wait_until(lambda: bool((alice.frames == bob.frames).all()), "they share")
        touched = 'mergemem_hints_faults_total{kind="first_touch"}'
        before = agent.metrics()[touched]
        carol = alice.actor.fork()
        targets(3)
        bob.actor.region(2 * REGION_PAGES, seed=8)
        wait_until(lambda: agent.metrics()[touched] >= before + REGION_PAGES, "faults are told of")
        scanned = agent.metrics()['mergemem_scanned_pages_total{policy="actors"}']
        resident = resident_bytes(agent.pid)
        print(f"agent: {resident / 2**20:.0f} MiB resident, {scanned:.0f} pages scanned")
        assert resident <= 80 * 10**6 + 10 * scanned
        carol.exit()
        targets(2)
        assert agent.metrics()['mergemem_hints_lost_total{reason="events"}'] == 0
        agent.stop()


class NotedHints(BpfHints):
    """A source that notes since when it has been told to watch a process."""

    def __init__(self, program: HintProgram) -> None:
        super().__init__(program)
        self.watched_since: dict[int, float] = {}

    def watch(self, processes: Iterable[ProcessId]) -> None:
        wanted = list(processes)
        super().watch(wanted)
        now = seconds_since_boot()
        for process in wanted:
            self.watched_since.setdefault(process.pid, now)

    def close(self) -> None:
        """Not the program, which is for other tests too."""


class NotedTargets(Targets):
    """Targets that note events, when one was forgotten, and each look at all of /proc."""

    def __init__(self, policies: PolicySet) -> None:
        super().__init__(policies, ProcFs())
        self.forked: set[int] = set()
        self.ended: set[int] = set()
        self.forgotten: dict[int, float] = {}
        self.syncs = 0

    def take_events(self, events: ProcessEvents) -> bool:
        changed = super().take_events(events)
        self.forked |= events.forked
        self.ended |= events.ended
        return changed

    def sync(self) -> None:
        super().sync()
        self.syncs += 1

    def forget(self, target: Target) -> None:
        super().forget(target)
        self.forgotten.setdefault(target.process.pid, seconds_since_boot())


def seconds_since_boot() -> float:
    """As /proc/PID/stat has the start of a process."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@contextmanager
def signals_kept() -> Iterator[None]:
    """The agent takes them over."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)


# An actor calls itself by the path of its program, until it executes that anew.
EXECUTED = """
policies:
  - name: executed
    select: {executable: "**/build/actor", command_line: "^actor "}
    settle: "300ms"
"""


def test_the_agent_follows_events_alone(
    stage: Stage, program: HintProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, where no look into /proc is due for minutes: only events can have told."""
    files = Agent(tmp_path, EXECUTED, hints="auto", rescan="10m")
    source, targets = NotedHints(program), NotedTargets(load([files.policy_file]))
    source.events()  # what other tests left
    monkeypatch.setattr("mergemem_agent.targets.RECHECK_FIRST_SECONDS", 3600.0)
    monkeypatch.setattr("mergemem_agent.agent.open_hints", lambda _: source)
    monkeypatch.setattr("mergemem_agent.pipeline.Targets", lambda *_: targets)
    seconds: dict[str, list[float]] = {"exec": [], "fork": [], "exit": []}

    def soon(condition: Callable[[], bool], what: str) -> None:
        wait_until(condition, what, EVENT_LIMIT_SECONDS)

    def comes(actor: Actor, how: str, since: float) -> None:
        soon(lambda: actor.pid in source.watched_since, f"it is a target, by {how}")
        seconds[how].append(source.watched_since[actor.pid] - since)

    def is_no_target(actor: Actor) -> None:
        soon(lambda: actor.pid in targets.forked and not targets.waiting, "it has been looked at")
        assert actor.pid not in source.watched_since

    def goes(actor: Actor) -> None:
        asked = seconds_since_boot()
        actor.exit()
        # A scan that fails forgets it too, so its end must have been told besides.
        soon(lambda: actor.pid in targets.ended, "its end is told")
        soon(lambda: actor.pid in targets.forgotten, "it is forgotten")
        seconds["exit"].append(targets.forgotten[actor.pid] - asked)

    def come_and_go() -> None:
        try:
            wait_until(lambda: targets.syncs > 0, "it has begun")
            for _ in range(3):
                alice = stage.start()
                is_no_target(alice)
                asked = seconds_since_boot()
                alice = alice.exec()
                comes(alice, "exec", asked)
                bob = alice.fork()
                comes(bob, "fork", bob.key.start_time_ticks / os.sysconf("SC_CLK_TCK"))
                goes(bob)
                goes(alice)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with signals_kept():
        options = service.Options((files.policy_file,), None, files.status_file)
        agent = service.Agent(options, ProcFs(), Notifier({}))
        with ThreadPoolExecutor() as script:
            done = script.submit(come_and_go)
            agent.run()
        done.result()
    for how, times in seconds.items():
        print(f"{how}: known after {', '.join(f'{each:.2f}' for each in times)} s in this guest")
    assert targets.syncs == 1  # when it began


def test_the_agent_says_so_when_there_are_none(stage: Stage, tmp_path: Path) -> None:
    with Agent(tmp_path, POLICIES, hints="auto", prefix=only("CAP_SYS_PTRACE")) as agent:
        alice, bob = (stage.start().region(600, seed=9) for _ in range(2))
        wait_until(lambda: bool((alice.frames == bob.frames).all()), "they share all the same")
        assert 'mergemem_hints_source{source="proc"}' in agent.metrics()
        assert len(re.findall("hints: none.*CAP_BPF", agent.log)) == 1
        agent.stop()
