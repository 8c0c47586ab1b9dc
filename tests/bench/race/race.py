# SPDX-License-Identifier: MIT
"""One run: one contestant, one fresh set of identical processes, watched from outside.

The contestant is up and idle before there is a process. Its CPU time counts from then on; the
clock, from the moment when the last process has filled its memory. All is counted in the same way
for all contestants: frames, through pagemap. The watcher takes CPU time of its own, and nobody is
charged for that.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.bench import tracing
from tests.bench.race import census, churn, interrupts
from tests.bench.race.cases import FLAT_OUT, MERGEMEM, SLOW, Case
from tests.bench.race.contestant import Contestant
from tests.bench.race.fleet import Fleet
from tests.bench.race.server import Server
from tests.bench.race.workload import Workload
from tests.demo import frames

SAMPLE_SECONDS = 0.5
ENOUGH_SHARE = 0.95
# After the merging, before being idle is measured.
REST_SECONDS = 8.0
FLUSH = "flush_tlb_mm_range"


@dataclass
class Baseline:
    """What the same processes take with nobody merging: what fork shares, and the census."""

    shared_by_fork: int = 0
    duplicates: int = 0


@dataclass
class Run:
    """One contestant in one case."""

    case: Case
    contestant: Contestant
    directory: Path
    baseline: Baseline | None
    # Count flushes as well: costs who flushes, so its CPU time is not to be used.
    instrumented: bool = False
    samples: list[dict[str, float]] = field(default_factory=list)

    def go(self) -> dict[str, Any]:
        """All of it; raises what is wrong."""
        self.server: Server | None = None
        if self.case.server:
            # It runs already, as servers do, when somebody starts to merge.
            self.server = Server(self.directory / "server", self.contestant.opt_in)
        facts: dict[str, Any] = {
            "contestant": self.contestant.name,
            "instrumented": self.instrumented,
            "start": self.contestant.start(),
        }
        with ExitStack() as stack:
            counts: dict[int, int] = {}
            if self.instrumented:
                event = stack.enter_context(tracing.probe("flush", FLUSH))
                counts = stack.enter_context(tracing.counted(event))
            self._cpu_before = self.contestant.cpu()
            interrupts_before = interrupts.read()
            self._start_processes()
            self._watch()
            facts["interrupts"] = interrupts.since(interrupts_before)
            if self.case.idle_seconds and self.baseline:
                facts["idle"] = self._idle()
        if self.instrumented:
            facts["flushes"] = counts.get(self.contestant.pid, 0)
        facts |= self.contestant.account()
        facts |= self._end()
        self.contestant.stop()
        return facts | {"samples": self.samples}

    # ---- processes ----

    def _start_processes(self) -> None:
        case, how = self.case, self.contestant.opt_in
        self.workload: Workload | Fleet
        self.workload = (
            Workload(case.kind, case.pages_each, how) if case.kind else Fleet(case.products, how)
        )
        self._breaks: churn.Breaks | None = None
        self._zero = time.monotonic()
        if not case.grow_seconds or not self.baseline:
            self.workload.start(case.processes)
        else:
            for number in range(case.processes):
                self._sample_until(self._zero + number * case.grow_seconds)
                self.workload.start(1)
        self._ready = time.monotonic()

    @property
    def pids(self) -> tuple[int, ...]:
        return self.workload.pids

    # ---- watching ----

    def _watch(self) -> None:
        """Until nothing more comes back, or the time is over."""
        slow = self.contestant.name in SLOW
        limit = self.case.slow_limit_seconds if slow else self.case.limit_seconds
        if not self.baseline:
            self._sample()
            return
        while (seconds := time.monotonic() - self._ready) < max(limit, self.case.window_seconds):
            if seconds > self.case.window_seconds and self._enough():
                break
            if self.server:
                self.server.tick()
            self._sample_until(self._ready + seconds + SAMPLE_SECONDS)
        self._sample()

    def _sample_until(self, deadline: float) -> None:
        while (now := time.monotonic()) < deadline:
            self._sample()
            time.sleep(max(0.0, min(deadline, now + SAMPLE_SECONDS) - time.monotonic()))

    def _sample(self) -> None:
        found = frames.count(self.pids)
        now, cpu = time.monotonic(), self.contestant.cpu()
        self.samples.append(
            {
                "at": now,
                "frames": found.frames,
                "mappings": found.mappings + found.zero_mappings,
                "zero_mappings": found.zero_mappings,
                "cpu_ns": cpu.ns - self._cpu_before.ns,
                "user_ticks": cpu.user_ticks - self._cpu_before.user_ticks,
                "system_ticks": cpu.system_ticks - self._cpu_before.system_ticks,
            }
        )
        if self.case.kind == "churn" and isinstance(self.workload, Workload):
            self._look_for_breaks(now, self.workload)

    def _look_for_breaks(self, now: float, workload: Workload) -> None:
        workers = workload.workers
        if not self._breaks:
            self._breaks = churn.Breaks(churn.written_parts([each.pages for each in workers]))
        self._breaks.look(now, [churn.frames_of(w.pid, w.address, w.pages) for w in workers])

    def _share(self, sample: dict[str, float]) -> float:
        assert self.baseline
        saved = sample["mappings"] - sample["frames"] - self.baseline.shared_by_fork
        return saved / max(1, self.baseline.duplicates)

    def _enough(self) -> bool:
        """Whether most has come back, or nobody asks how long that takes."""
        return self.case.window_only or self._share(self.samples[-1]) >= ENOUGH_SHARE

    def _idle(self) -> dict[str, float]:
        """What the contestant takes when there is nothing to do any more."""
        time.sleep(REST_SECONDS)
        before, cpu = time.monotonic(), self.contestant.cpu().ns
        time.sleep(self.case.idle_seconds)
        seconds = time.monotonic() - before
        return {"seconds": seconds, "cpu_seconds": (self.contestant.cpu().ns - cpu) / 1e9}

    # ---- the end ----

    def _end(self) -> dict[str, Any]:
        """The exact census, every byte compared, everything ended."""
        self.workload.pause()
        found = census.take(self.pids)
        self._sample()
        del self.samples[-1]["at"]
        facts: dict[str, Any] = {"ready": self._ready, "census": asdict(found)}
        # What holds for the census, whose reading comes last, is not part of the curve.
        facts["at_census"] = self.samples.pop()
        if not self.baseline:
            last = facts["at_census"]
            shared = int(last["mappings"] - last["frames"])
            self.baseline = Baseline(shared, found.mappings - found.contents - shared)
            facts["baseline"] = asdict(self.baseline)
        if self._breaks:
            facts["breaks"] = {"merged": self._breaks.merged, "broken": self._breaks.broken}
        if self.server:
            facts["server"] = self.server.stop()
        self.workload.verify()
        self.workload.stop()
        return facts


def wants_instruments(name: str) -> bool:
    """Whose flushes are counted, in a run of its own."""
    return name in (MERGEMEM, FLAT_OUT)
