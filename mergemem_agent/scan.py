# SPDX-License-Identifier: MIT
"""The scan queue: which regions to look at next, and the look itself.

Targets take turns, so that none starves; each turn takes the next few regions of one target that
are due, at most SLICE_REGIONS of them and neighbours, in one CHECKSUM request. When a region is
due is decided after each look at it (region.py), and by hints. The queue holds no list of its own:
it is the tables of the targets, bounded by MAX_REGIONS in each.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mergemem_agent.contract import PAGE_BYTES
from mergemem_agent.module import Module
from mergemem_agent.procfs import Mapping, PermissionDenied, ProcessGone, ProcessId, ProcFs
from mergemem_agent.region import (
    REGION_PAGES,
    REGION_SHIFT,
    Look,
    Wanted,
    blank_records,
)
from mergemem_agent.targets import Pool, Target, Targets

Array = np.ndarray[Any, np.dtype[Any]]

log = logging.getLogger(__name__)

# One request: 16 MiB of address space, 3 ms of checksums when all of it is resident.
SLICE_REGIONS: Final = 8

# 256 GiB of address space of one process; the table of it takes 8 MB.
MAX_REGIONS: Final = 1 << 17

# Mappings of a target are read again this often, and ever more rarely while they stay the same.
MAPPINGS_SECONDS: Final = 10.0
MAPPINGS_MAX_SECONDS: Final = 120.0


@dataclass(frozen=True)
class Hint:
    """What page faults tell of one region since the last hint about it.

    Many first touches are new memory: worth a scan once it has been quiet. Many write-protect
    faults mean that sharing has just broken: not worth one soon.
    """

    process: ProcessId
    address: int  # of the region: a multiple of 2 MiB
    first_touches: int
    write_protect_faults: int


@dataclass(frozen=True)
class Slice:
    """Neighbouring regions of one target that are due: `count` rows of its table from `first`."""

    target: Target
    first: int
    count: int


@dataclass(frozen=True)
class QueueState:
    """How long the queue is, in regions."""

    regions: int
    due: int
    dropped: int  # beyond MAX_REGIONS of a target


class ScanQueue:
    """Hands out what is due, target by target."""

    def __init__(self, targets: Targets, procfs: ProcFs) -> None:
        """Queue the regions of `targets`, whoever they are at the moment of each call."""
        self._targets = targets
        self._procfs = procfs
        self._turns: deque[Target] = deque()
        self._mapping_intervals: dict[ProcessId, float] = {}
        self._dropped: dict[ProcessId, int] = {}

    def next(self, ready: Callable[[Target], bool]) -> Slice | None:
        """Return the next slice that is due, of a target that is `ready`; None: nothing is."""
        now = time.monotonic()
        self._queue_newcomers()
        for _ in range(len(self._turns)):
            target = self._turns.popleft()
            if target not in self._targets:
                continue
            self._turns.append(target)
            if ready(target) and self._read_mappings(target, now):
                due = _first_due(target, now)
                if due is not None:
                    return due
        return None

    def take_hints(self, hints: Iterable[Hint]) -> None:
        """Let page faults say which regions to look at sooner, and which later."""
        now = time.monotonic()
        by_process = {target.process: target for target in self._targets}
        for hint in hints:
            target = by_process.get(hint.process)
            row = target.regions.find(hint.address >> REGION_SHIFT) if target else None
            if target is None or row is None:
                continue
            rows, settle = target.regions.rows, target.policy.settle_seconds
            if hint.write_protect_faults > hint.first_touches:
                rows["due"][row] = max(rows["due"][row], now + 2 * settle)
            else:
                rows["due"][row] = min(rows["due"][row], now + settle)

    def due_in(self, pool: Pool) -> bool:
        """Tell whether processes that share have regions that are due."""
        now = time.monotonic()
        return any((t.regions.rows["due"] <= now).any() for t in self._targets.pool(pool))

    def state(self) -> QueueState:
        """Count the queue."""
        now = time.monotonic()
        tables = [target.regions.rows["due"] for target in self._targets]
        return QueueState(
            regions=sum(map(len, tables)),
            due=sum(int(np.count_nonzero(table <= now)) for table in tables),
            dropped=sum(self._dropped.values()),
        )

    def _queue_newcomers(self) -> None:
        if len(self._turns) != len(self._targets):
            known = {id(target) for target in self._turns}
            self._turns.extend(t for t in self._targets if id(t) not in known)
            alive = {target.process for target in self._targets}
            for process in self._mapping_intervals.keys() - alive:
                self._mapping_intervals.pop(process)
                self._dropped.pop(process, None)

    def _read_mappings(self, target: Target, now: float) -> bool:
        """Learn of regions that came and went, if it is time; False: the target is none now."""
        if now < target.mapped:
            return True
        try:
            numbers = region_numbers(self._procfs.mappings(target.process.pid))
        except ProcessGone:
            self._targets.forget(target)
            return False
        except PermissionDenied as denied:
            log.info("scan: process %d is left alone: %s", target.process.pid, denied.message)
            self._targets.refuse(target)
            return False
        self._dropped[target.process] = max(0, len(numbers) - MAX_REGIONS)
        changed = target.regions.replace(numbers[:MAX_REGIONS])
        interval = self._mapping_intervals.get(target.process, MAPPINGS_SECONDS / 2)
        interval = MAPPINGS_SECONDS if changed else min(interval * 2, MAPPINGS_MAX_SECONDS)
        self._mapping_intervals[target.process] = interval
        target.mapped = now + interval
        return True


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


def look(module: Module, work: Slice, max_mappings: int) -> Look:
    """Checksum all pages of a slice in full, and remember what was seen.

    Raises what Module.checksum() raises.
    """
    target, rows = work.target, work.target.regions.rows
    address = int(rows["number"][work.first]) << REGION_SHIFT
    records = blank_records(work.count)
    for run in module.checksum(
        target.process,
        address,
        work.count * REGION_PAGES,
        undumpable=target.policy.include_undumpable,
    ):
        start = (run.address - address) // PAGE_BYTES
        records[start : start + len(run.records)] = run.records
    policy = target.policy
    return target.regions.look(
        work.first,
        work.count,
        records,
        time.monotonic(),
        policy.settle_seconds,
        max_mappings,
        Wanted(huge=policy.rules.split_percent is not None, zero=policy.zero_pages),
    )


def _first_due(target: Target, now: float) -> Slice | None:
    """Return the neighbours that are due from the one on that has waited longest."""
    rows = target.regions.rows
    if not len(rows):
        return None
    first = int(np.argmin(rows["due"]))
    if rows["due"][first] > now:
        return None
    following = rows[first : first + SLICE_REGIONS]
    next_number = rows["number"][first] + np.arange(len(following), dtype=np.uint64)
    fit = (following["due"] <= now) & (following["number"] == next_number)
    count = len(fit) if fit.all() else int(np.argmin(fit))
    return Slice(target, first, count)
