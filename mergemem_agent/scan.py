# SPDX-License-Identifier: MIT
"""The scan queue: which regions to look at next.

The queue holds no list of its own: it is the tables of the targets, bounded by MAX_REGIONS in each.
When a region is due is decided after each look at it (schedule.py), by the search for partners
(search.py), and by hints; which of those that are due goes first, by what it promises (order.py).
"""

from __future__ import annotations

import heapq
import logging
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from mergemem_agent.hint import Hint
from mergemem_agent.order import BATCH_REGIONS, SLICE_REGIONS, WORTH_PAGES, Plan, Slice
from mergemem_agent.prior import Costs, Siblings, Success
from mergemem_agent.procfs import Mapping, PermissionDenied, ProcessGone, ProcessId, ProcFs
from mergemem_agent.region import REGION_SHIFT, Regions
from mergemem_agent.schedule import NEGLECT_SECONDS, have_shown
from mergemem_agent.targets import Pool, Target, Targets
from mergemem_agent.window import Look

Array = np.ndarray[Any, np.dtype[Any]]

log = logging.getLogger(__name__)

# 256 GiB of address space of one process; the table of it takes 11 MB.
MAX_REGIONS: Final = 1 << 17

# Mappings of a target are read again this often, and ever more rarely while they stay the same.
MAPPINGS_SECONDS: Final = 10.0
MAPPINGS_MAX_SECONDS: Final = 120.0
# ... and so soon after a hint about memory that was not mapped when they were read.
MAPPINGS_HINT_SECONDS: Final = 1.0
_MAPPINGS_AT_ONCE: Final = 8
_MAPPINGS_TICKS: Final = 4

# A process is not scanned before it is as old as its policy's `settle`, or as this.
YOUNG_SECONDS: Final = 2.0

# An order holds for so long, or as many times as long as it took to find.
_PLAN_SECONDS: Final = 1.0
_PLAN_FACTOR: Final = 20.0

# Of one CPU: for looks that promise next to nothing, see order.py; and how often it is worth waking
# up to find out that nothing else is due.
IDLE_SHARE: Final = 0.001
IDLE_SECONDS: Final = 2.0


@dataclass(frozen=True)
class QueueState:
    """How long the queue is, in regions, and how far behind."""

    regions: int
    due: int
    dropped: int  # beyond MAX_REGIONS of a target
    overdue_seconds: float = 0.0  # for how long the first of them has been due
    hints: dict[str, int] = field(default_factory=dict)  # taken in, by what became of them
    cost_seconds: dict[str, float] = field(default_factory=dict)  # of each part of a scan


@dataclass
class _Tracked:
    """What the queue keeps of a target, beside its regions."""

    target: Target
    regions: Regions
    interval: float = MAPPINGS_SECONDS / 2
    dropped: int = 0


class ScanQueue:
    """Hands out what is due, best first."""

    def __init__(self, targets: Targets, procfs: ProcFs) -> None:
        """Queue the regions of `targets`, whoever they are at the moment of each call."""
        self._targets = targets
        self._procfs = procfs
        self._tracked: dict[ProcessId, _Tracked] = {}
        self._to_read: list[tuple[float, ProcessId]] = []  # a heap of mappings, by when
        self._siblings: defaultdict[Pool, Siblings] = defaultdict(Siblings)
        self.success = Success()
        self.costs = Costs()
        self._plan: Plan | None = None
        self._plan_ends = 0.0
        self._idle_until = 0.0  # until then, only what is worth it is looked at
        self._idle = False  # nothing is due but what is not
        self._hints: Counter[str] = Counter()

    # --- targets that come and go ---------------------------------------------------------------

    def follow(self) -> list[Regions]:
        """Notice targets that came and went; return what was known of those that went.

        So it does where a target starts over, since its policy has changed.
        """
        gone = []
        current = {target.process: target for target in self._targets}
        for process in self._tracked.keys() - current.keys():
            gone.append(self._tracked.pop(process).regions)
        for process, target in current.items():
            tracked = self._tracked.get(process)
            if tracked is None or tracked.regions is not target.regions:
                if tracked is None:
                    target.mapped = max(target.mapped, _grown_up(target))
                else:
                    gone.append(tracked.regions)
                self._tracked[process] = _Tracked(target, target.regions)
                self._read_later(target)
        if gone:
            pools = {target.pool for target in current.values()}
            for pool in self._siblings.keys() - pools:
                del self._siblings[pool]
        return gone

    def read_mappings(self, ready: Callable[[Target], bool]) -> bool:
        """Learn of regions that came and went in a few targets; False: it is time for none."""
        now = time.monotonic()
        read = 0
        while self._to_read and self._to_read[0][0] <= now and read < _MAPPINGS_AT_ONCE:
            _, process = heapq.heappop(self._to_read)
            tracked = self._tracked.get(process)
            # Once put off, or hastened by a hint, a process is in the heap twice.
            if tracked is None or tracked.target.mapped > now:
                continue
            if ready(tracked.target):
                self._read_mappings(tracked, now)
                read += 1
            else:
                tracked.target.mapped = now + MAPPINGS_HINT_SECONDS
            self._read_later(tracked.target)
        return read > 0

    def _read_later(self, target: Target) -> None:
        if target.mapped < math.inf:
            heapq.heappush(self._to_read, (target.mapped, target.process))

    def _read_mappings(self, tracked: _Tracked, now: float) -> None:
        target = tracked.target
        try:
            numbers = region_numbers(self._procfs.mappings(target.process.pid, anonymous=True))
        except ProcessGone:
            self._targets.forget(target)
            target.mapped = math.inf
            return
        except PermissionDenied as denied:
            log.info("scan: process %d is left alone: %s", target.process.pid, denied.message)
            self._targets.refuse(target)
            target.mapped = math.inf
            return
        tracked.dropped = max(0, len(numbers) - MAX_REGIONS)
        changed = target.regions.replace(numbers[:MAX_REGIONS], now)
        doubled = min(tracked.interval * 2, MAPPINGS_MAX_SECONDS)
        tracked.interval = MAPPINGS_SECONDS if changed else doubled
        # At the same times for all that are read as often: the agent wakes up once for them.
        tick = tracked.interval / _MAPPINGS_TICKS
        target.mapped = math.ceil(now / tick + _MAPPINGS_TICKS) * tick

    # --- what is due ----------------------------------------------------------------------------

    def next(
        self, ready: Callable[[Target], bool], seconds: Callable[[str], float] = lambda _: 0.0
    ) -> list[Slice]:
        """Return slices that are due, of targets that are `ready`; none: nothing is.

        One look() does for all of them; they should take as much CPU time as `seconds` allows their
        policy at most, but for the first.
        """
        for _ in range(2):
            if self._plan is None or not len(self._plan) or time.monotonic() >= self._plan_ends:
                self._plan = self._make_plan(ready)
            if batch := self._batch(self._plan, ready, seconds):
                self._idle = False
                return batch
            if self._plan_ends > time.monotonic():
                break
        return []

    def _batch(
        self, plan: Plan, ready: Callable[[Target], bool], seconds: Callable[[str], float]
    ) -> list[Slice]:
        batch: list[Slice] = []
        regions, cost_seconds = 0, 0.0
        if time.monotonic() < self._idle_until and plan.drop_unworthy():
            self._idle = True
        while len(plan):
            work = plan.peek()
            if work and work.target in self._targets and ready(work.target):
                regions += work.count
                cost_seconds += work.cost_seconds
                allowed_seconds = seconds(work.target.policy.name)
                # What is not worth it is done little by little, and not all at once after a rest.
                most = BATCH_REGIONS if work.worth else SLICE_REGIONS
                too_much = regions > most or cost_seconds > allowed_seconds
                if batch and (too_much or not work.goes_with(batch[0])):
                    break
                batch.append(work)
            plan.skip()
        return batch

    def _make_plan(self, ready: Callable[[Target], bool]) -> Plan:
        now = time.monotonic()
        due = [
            tracked.target
            for tracked in self._tracked.values()
            if tracked.regions.next_due <= now
            and tracked.target in self._targets
            and ready(tracked.target)
        ]
        siblings = [self._siblings[target.pool] for target in due]
        plan = Plan(due, siblings, self.success, self.costs, now)
        took = time.monotonic() - now
        self._plan_ends = now + max(_PLAN_SECONDS, took * _PLAN_FACTOR)
        return plan

    def learn(self, done: Sequence[Slice], seen: Look, cpu_seconds: float) -> None:
        """Let what a look has seen, and cost, change what is expected of others."""
        if not done[0].worth:
            self._idle_until = time.monotonic() + cpu_seconds / IDLE_SHARE
        regions = sum(work.count for work in done)
        self.costs.learn(cpu_seconds, regions, seen.sampled, seen.checksummed)
        self.success.learn(seen.deepened, seen.settled, 0)
        tables = [
            work.target.regions.rows[work.first : work.first + work.count]
            for work in done
            if work.sampled
        ]
        if not tables:
            return
        target, rows = done[0].target, np.concatenate(tables)
        self._learn_shares(target.pool, rows[have_shown(rows, target.policy.settle_seconds)])

    def learn_merged(
        self, pool: Pool, memories: Sequence[Regions], before: Sequence[Array]
    ) -> None:
        """Let regions in which pages have just merged speak for the same ones of others to come.

        And those of the same number in which none have; `before` tells how many pages each region
        had merged. For the average of the pool they do not speak: these are chosen ones.
        """
        pairs = list(zip(memories, before, strict=True))
        gained = [one.rows["number"][one.rows["merged"] > merged] for one, merged in pairs]
        numbers = np.unique(np.concatenate(gained)) if gained else ()
        if not len(numbers):
            return
        rows = np.concatenate([one.rows[np.isin(one.rows["number"], numbers)] for one in memories])
        rows = rows[(rows["looks"] > 0) & (rows["first"] == 0) & (rows["second"] == 0)]
        self._learn_shares(pool, rows, average=False)

    def _learn_shares(self, pool: Pool, rows: Array, average: bool = True) -> None:
        if len(rows):
            self._siblings[pool].learn(rows["number"], rows["pages"], rows["merged"], average)

    def due_in(self, pool: Pool) -> bool:
        """Tell whether processes that share have regions that are due, and will be looked at."""
        if self._idle:
            return False
        now = time.monotonic()
        return any(target.regions.next_due <= now for target in self._targets.pool(pool))

    def search_rest_seconds(self, pages: int, fresh: int) -> float:
        """Return how long to wait before `pages` are searched for `fresh` ones; 0: not at all.

        The rule is that of looks, if all of them merge: what promises too little has IDLE_SHARE of
        one CPU.
        """
        cost_seconds = pages * self.costs.search
        if fresh >= WORTH_PAGES * cost_seconds:
            return 0.0
        return min(NEGLECT_SECONDS, cost_seconds / IDLE_SHARE)

    def wait_seconds(self, now: float, wait_of: Callable[[str], float]) -> float:
        """Return how long nothing is due; `wait_of` tells how long a policy has to wait."""
        waits = {policy.name: wait_of(policy.name) for policy in self._targets.policies.policies}
        first = math.inf
        for tracked in self._tracked.values():
            due = tracked.regions.next_due
            if self._idle and due <= now:
                soon = max(tracked.regions.due_after(now), now + IDLE_SECONDS)
                due = min(self._idle_until, soon)
            due = min(due, tracked.target.mapped)
            if due < first and tracked.target in self._targets:
                first = min(first, max(due, now + waits.get(tracked.target.policy.name, 0.0)))
        return max(0.0, first - now)

    # --- hints ----------------------------------------------------------------------------------

    def take_hints(self, hints: Iterable[Hint]) -> None:
        """Let page faults say which regions to look at sooner, and which later.

        New memory is looked at once it has been quiet for `settle`; where sharing breaks, after
        twice as long. Each hint is counted once: "region" (it has moved a look), "mapping" (the
        target's mappings are read again soon), or why it is of no use: "process", "late".
        """
        now = time.monotonic()
        moved: dict[ProcessId, Target] = {}
        for hint in hints:
            tracked = self._tracked.get(hint.process)
            if tracked is None or tracked.target not in self._targets:
                self._hints["process"] += 1
                continue
            target = tracked.target
            row = target.regions.find(hint.address >> REGION_SHIFT)
            if row is None:
                if target.mapped > now + MAPPINGS_HINT_SECONDS:
                    target.mapped = now + MAPPINGS_HINT_SECONDS
                    self._read_later(target)
                self._hints["mapping"] += 1
            elif target.regions.hint(row, now, target.policy.settle_seconds, hint):
                moved[hint.process] = target
                self._hints["region"] += 1
            else:
                self._hints["late"] += 1
        for target in moved.values():
            target.regions.schedule(now, target.policy.settle_seconds)

    def state(self) -> QueueState:
        """Count the queue."""
        now = time.monotonic()
        first, due, regions = math.inf, 0, 0
        for tracked in self._tracked.values():
            table = tracked.regions
            regions += len(table.rows)
            if table.next_due <= now:
                times = table.rows["due"][table.rows["due"] <= now]
                due += len(times)
                first = min(first, float(times[times > 0].min(initial=math.inf)))
        return QueueState(
            regions=regions,
            due=due,
            dropped=sum(tracked.dropped for tracked in self._tracked.values()),
            overdue_seconds=max(0.0, now - first),
            hints=dict(self._hints),
            cost_seconds=vars(self.costs).copy(),
        )


def _grown_up(target: Target) -> float:
    """Return when a process is old enough to be scanned, as time.monotonic() has it."""
    ticks_per_second = os.sysconf("SC_CLK_TCK")
    born = target.process.start_time_ticks / ticks_per_second
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - born
    return time.monotonic() + min(target.policy.settle_seconds, YOUNG_SECONDS) - age


def region_numbers(mappings: Sequence[Mapping]) -> Array:
    """Return the numbers of all regions in which something anonymous is mapped, ascending.

    Mappings without any permission are reservations: nothing was ever written there.
    """
    parts = [
        np.arange(mapping.start >> REGION_SHIFT, ((mapping.end - 1) >> REGION_SHIFT) + 1)
        for mapping in mappings
        if mapping.anonymous and mapping.permissions[:3] != "---"
    ]
    return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *parts])).astype(np.uint64)
