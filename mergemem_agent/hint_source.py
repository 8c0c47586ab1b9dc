# SPDX-License-Identifier: MIT
"""Where hints and process events come from: a BPF program, or nowhere.

Faults are counted in one of two maps. A drain turns the other one on, waits until no processor
can be writing to the first any more, and empties that: so nothing falls between reading and
deleting, and what was counted but is not there has been evicted, to the last fault.

The cost of a storm of faults is bounded by sampling. All that a fault costs which is not sampled
is the way into the program and out again; those that are sampled shall be SAMPLED_PER_SECOND at
most, on all processors together, so each drain sets N anew, to a power of two, from the rate that
it finds: up with the next drain, down by half each time. (Only faults of targets wake an idle
agent: a storm of others' is noticed when that looks around, after twenty seconds at most.)
"""

from __future__ import annotations

import ctypes
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

import numpy as np

from mergemem_agent.hint import LOSSES, Hint, HintState, ProcessEvents, SourceKind
from mergemem_agent.hint_program import (
    EVENT_COUNTED,
    EVENT_EXEC,
    EVENT_EXIT,
    EVENT_FORK,
    HintProgram,
    NoProgram,
    give_memory_back,
)
from mergemem_agent.procfs import ProcessId
from mergemem_agent.region import REGION_SHIFT

Array = np.ndarray[Any, np.dtype[Any]]

log = logging.getLogger(__name__)

DRAIN_SECONDS: Final = 1.0
EVENT_SECONDS: Final = 0.25  # how often it is worth asking for events
LOSS_DRAINS: Final = 15  # lost events are looked for every so many times DRAIN_SECONDS

# Counting one takes some 150 ns, so this is 0.015 % of one CPU.
SAMPLED_PER_SECOND: Final = 1_000
DEFAULT_SAMPLING: Final = 64
MAX_SAMPLING: Final = 1024

_REGION_NUMBER_BITS: Final = 57 - REGION_SHIFT  # bpf/region.h
_SYS_MEMBARRIER: Final = 324  # x86-64
_MEMBARRIER_GLOBAL: Final = 1


class HintSource(Protocol):
    """What the agent asks, whether there is anything to be had or not."""

    poll_seconds: float  # events are not worth being taken more often

    def watch(self, processes: Iterable[ProcessId]) -> None:
        """Have hints of these processes from now on, and of no others."""

    def hints(self, processes: Iterable[ProcessId]) -> list[Hint]:
        """Return what came since the last time, and watch these processes from now on."""

    def has_hints(self) -> bool:
        """Tell whether it is time for hints() and there may be some."""

    def wake_for_hints(self) -> bool:
        """Have the next hint wake whoever waits for the descriptor, once, or until a drain.

        To be followed by has_hints(): they may have come before. False: too soon after a drain for
        that to tell, and nobody is woken.
        """

    def descriptor(self) -> int | None:
        """Return what can be waited for: it is readable while there are events."""

    def events(self) -> ProcessEvents | None:
        """Return what came since the last time; None: this source has no events."""

    def state(self) -> HintState:
        """Tell how it is doing."""

    def close(self) -> None:
        """Stop."""


class NoHints:
    """No BPF here, or not wanted."""

    poll_seconds = math.inf

    def watch(self, processes: Iterable[ProcessId]) -> None:
        """Do nothing."""

    def hints(self, processes: Iterable[ProcessId]) -> list[Hint]:
        """Return none."""
        del processes
        return []

    def has_hints(self) -> bool:
        """Tell that there are none."""
        return False

    def wake_for_hints(self) -> bool:
        """Do nothing: there will be none."""
        return True

    def descriptor(self) -> None:
        """Tell that there is nothing to wait for."""

    def events(self) -> None:
        """Tell that there are none, ever: look into /proc."""

    def state(self) -> HintState:
        """Tell that /proc is all there is."""
        return HintState()

    def close(self) -> None:
        """Do nothing."""


class BpfHints:
    """Hints and events from a loaded program."""

    poll_seconds = EVENT_SECONDS

    def __init__(
        self,
        program: HintProgram,
        sampling: int | None = None,
        drain_seconds: float = DRAIN_SECONDS,
    ) -> None:
        """Count one fault in `sampling`; None: as many as their rate allows."""
        self._program = program
        self._fixed = program.perf_sampling if program.kind is SourceKind.PERF else sampling
        self._sampling = self._fixed or DEFAULT_SAMPLING
        self._drain_seconds = drain_seconds
        self._drained = time.monotonic()
        self._epoch = 0
        self._watched: dict[int, ProcessId] = {}
        for left in (program.targets, *program.counts):
            left.take()  # what another source has left there
        totals = self._totals()
        self._taken = totals["counted"].tolist()  # that were drained, not multiplied, by epoch
        self._sampled = int(totals["sampled"])
        self._base_failed, self._base_missed = int(totals["failed"]), program.missed()
        self._base_events_lost = int(totals["events_lost"])
        self._faults: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()
        self._events_seen = self._events_missed = 0
        self._looked_for_misses = 0.0
        self._configure()

    @property
    def sampling(self) -> int:
        """One fault in so many is counted."""
        return self._sampling

    def watch(self, processes: Iterable[ProcessId]) -> None:
        """Have the faults and the end of these processes counted, and of no others."""
        wanted = {process.pid: process for process in processes}
        for pid in self._watched.keys() - wanted.keys():
            self._program.targets.delete(pid)
            del self._watched[pid]
        # The same pid may be another process by now: the kernel has forgotten the one before.
        for pid, process in wanted.items() - self._watched.items():
            try:
                self._program.targets.write(pid, 1)
            except OSError:  # full: this one is found and scanned all the same, without hints
                self._lost["filter_full"] += 1
            else:
                self._watched[pid] = process

    def hints(self, processes: Iterable[ProcessId]) -> list[Hint]:
        """Drain the counts, at most once in DRAIN_SECONDS; no region comes twice."""
        self.watch(processes)
        now = time.monotonic()
        if (passed := now - self._drained) < self._drain_seconds:
            return []
        self._drained = now
        totals = self._totals()
        sampling = self._next_sampling(int(totals["sampled"]), passed)
        counted = int(totals["counted"][self._epoch]) != self._taken[self._epoch]
        return self._drain(sampling) if counted or sampling != self._sampling else []

    def has_hints(self) -> bool:
        """Tell whether a drain is due: there are counts, or too many faults are being sampled."""
        passed = time.monotonic() - self._drained
        if passed < self._drain_seconds:
            return False
        totals = self._totals()
        if totals["counted"][self._epoch] != self._taken[self._epoch]:
            return True
        return bool(totals["sampled"] - self._sampled > SAMPLED_PER_SECOND * passed)

    def wake_for_hints(self) -> bool:
        """Have the program report the next fault that it counts; False: too soon after a drain."""
        if time.monotonic() - self._drained < self._drain_seconds:
            return False
        self._program.configure(self._epoch, *self._chosen, wake=True)
        return True

    def descriptor(self) -> int:
        """Return that of the ring buffer."""
        return self._program.events_descriptor

    def events(self) -> ProcessEvents:
        """Take all events out of the ring buffer."""
        events = [event for event in self._program.take_events() if event[0] != EVENT_COUNTED]
        self._events_seen += len(events)
        pids: dict[int, set[int]] = {EVENT_FORK: set(), EVENT_EXEC: set(), EVENT_EXIT: set()}
        for kind, pid in events:
            pids[kind].add(pid)
            if kind == EVENT_EXIT:  # so what came before is about a process that is no more
                pids[EVENT_FORK].discard(pid)
                pids[EVENT_EXEC].discard(pid)
                self._watched.pop(pid, None)
        complete = not self._events_were_lost(asked=bool(events))
        return ProcessEvents(
            forked=frozenset(pids[EVENT_FORK]),
            executed=frozenset(pids[EVENT_EXEC]),
            ended=frozenset(pids[EVENT_EXIT]),
            complete=complete,
        )

    def state(self) -> HintState:
        """Tell what came, and what did not; losses are as of the last drain."""
        return HintState(
            source=self._program.kind,
            sampling=self._sampling,
            first_touches=self._faults["first_touches"],
            write_protect_faults=self._faults["write_protect_faults"],
            events=self._events_seen,
            lost={reason: self._lost[reason] for reason in LOSSES},
        )

    def close(self) -> None:
        """Take the program out of the kernel."""
        self._program.close()

    def _events_were_lost(self, asked: bool) -> bool:
        """Tell whether the ring buffer was full, or the programs were not run, since last asked.

        Looked for when it is `asked` for, as events have come, and now and then.
        """
        now = time.monotonic()
        if now - self._looked_for_misses >= self._drain_seconds * LOSS_DRAINS:
            self._looked_for_misses = now
            self._events_missed = self._program.missed()[1] - self._base_missed[1]
        elif not asked:
            return False
        lost = int(self._totals()["events_lost"]) - self._base_events_lost + self._events_missed
        fresh = lost - self._lost["events"]
        self._lost["events"] = lost
        return fresh > 0

    def _drain(self, sampling: int) -> list[Hint]:
        """Empty the map that was written to until now, and go on with another N."""
        epoch, counted_one_in = self._epoch, self._sampling
        self._epoch, self._sampling = 1 - epoch, sampling
        self._configure()
        _wait_for_programs()
        keys, values = self._program.counts[epoch].take()
        first_touches = values["first_touches"].sum(axis=1, dtype=np.int64)
        write_protect_faults = values["write_protect_faults"].sum(axis=1, dtype=np.int64)
        self._taken[epoch] += int(first_touches.sum() + write_protect_faults.sum())
        self._count_losses(counted_one_in)
        return self._hints(
            keys, first_touches * counted_one_in, write_protect_faults * counted_one_in
        )

    def _hints(self, keys: Array, first_touches: Array, write_protect_faults: Array) -> list[Hint]:
        pids = keys >> np.uint64(_REGION_NUMBER_BITS)
        numbers = keys & np.uint64((1 << _REGION_NUMBER_BITS) - 1)
        found = []
        for pid, number, touches, faults in zip(
            pids.tolist(),
            numbers.tolist(),
            first_touches.tolist(),
            write_protect_faults.tolist(),
            strict=True,
        ):
            if process := self._watched.get(pid):
                found.append(Hint(process, number << REGION_SHIFT, touches, faults))
                self._faults["first_touches"] += touches
                self._faults["write_protect_faults"] += faults
            else:  # it ended, or is no target any more
                self._lost["gone"] += touches + faults
        return found

    def _count_losses(self, sampling: int) -> None:
        """Count what was sampled and is in no map, times N: that many faults nobody hears of."""
        totals = self._totals()
        counted = totals["counted"].tolist()
        # The map in use has not been drained: of that one, all counts as taken.
        evicted = max(0, counted[1 - self._epoch] - self._taken[1 - self._epoch])
        self._taken[1 - self._epoch] += evicted
        self._lost["evicted"] += evicted * sampling
        self._lost["map_full"] = int(totals["failed"]) - self._base_failed
        self._lost["missed"] = self._program.missed()[0] - self._base_missed[0]

    def _next_sampling(self, sampled: int, seconds: float) -> int:
        faults = (sampled - self._sampled) * self._sampling
        self._sampled = sampled
        following = next_sampling(self._sampling, faults / seconds)
        return self._fixed or max(self._program.least_sampling, following)

    def _configure(self) -> None:
        # The fallback's samples come from its own event: all of them are counted here.
        perf = self._program.kind is SourceKind.PERF
        one_in = 1 if perf else self._sampling // self._program.least_sampling
        highest = (1 << 32) // one_in - 1
        salt = (time.monotonic_ns() // 1000 * 0x9E3779B1) & 0xFFFFFFFF
        self._chosen = salt, highest
        self._program.configure(self._epoch, *self._chosen)

    def _totals(self) -> Any:
        """Return the totals of all CPUs, added up: one TOTALS."""
        cpus = self._program.totals.read(0)
        return cpus.view(np.uint64).reshape(len(cpus), -1).sum(axis=0).view(cpus.dtype)[0]


def next_sampling(sampling: int, faults_per_second: float) -> int:
    """Return the N, a power of two, that keeps what is counted at SAMPLED_PER_SECOND or below."""
    needed = math.ceil(math.log2(max(1.0, faults_per_second / SAMPLED_PER_SECOND)))
    return min(MAX_SAMPLING, max(1 << needed, sampling // 2))


def open_hints(wanted: bool, load: Callable[[], HintProgram] = HintProgram) -> HintSource:
    """Return the best source there is, and say once in the log which that is."""
    if not wanted:
        log.info("hints: switched off; processes are found in /proc, regions visited in turn")
        return NoHints()
    program: HintProgram | None = None
    try:
        program = load()
        _count_faults(program)
        give_memory_back()
    except NoProgram as failure:
        if program:
            program.close()
        log.warning(
            "hints: none; processes are found in /proc, regions visited in turn: %s%s",
            failure.message, f" ({failure.hint})" if failure.hint else "",
        )  # fmt: skip
        return NoHints()
    return BpfHints(program)


def _count_faults(program: HintProgram) -> None:
    try:
        program.count_faults(SourceKind.BPF)
    except NoProgram as failure:
        program.count_faults(SourceKind.PERF)
        log.warning("hints: from the software event of page faults: %s", failure.message)
    else:
        log.info("hints: from the tracepoints of page faults")


def _wait_for_programs() -> None:
    """Wait until every program has ended that began before: they run with RCU's read lock held."""
    libc = ctypes.CDLL(None)
    if libc.syscall(_SYS_MEMBARRIER, _MEMBARRIER_GLOBAL, 0, 0):
        # Not with nohz_full. A program takes microseconds; what is later all the same is counted
        # as evicted, or drained next time.
        time.sleep(0.05)
