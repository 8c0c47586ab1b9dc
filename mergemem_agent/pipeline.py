# SPDX-License-Identifier: MIT
"""The stages of mergemem in order. Pipeline.round() is the function to read first.

    page fault ─► hint ─► scan queue ─► checksum ─► candidate index ─► merge ─► metrics
                          scan.py       kmod/       search.py          kmod/    metrics.py
                                                    (index, huge)
                                       zero-filled pages ─► zero.py ──►

Work is done in slices, and `pace` is called after each: it sleeps as the budget demands, and may
end the round there and then by an exception, since each slice leaves everything in order.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np

from mergemem_agent import outcome
from mergemem_agent.budget import Budget
from mergemem_agent.cap import Caps
from mergemem_agent.contract import PAGE_BYTES, Result
from mergemem_agent.counts import Counts, PolicyMemory
from mergemem_agent.info import Limits
from mergemem_agent.merge import GONE, Request
from mergemem_agent.module import (
    AccessDenied,
    Busy,
    Module,
    ModuleFailure,
    ModuleMissing,
    NoSuchProcess,
    PermissionDenied,
)
from mergemem_agent.policy import PolicySet
from mergemem_agent.procfs import ProcFs
from mergemem_agent.region import Regions
from mergemem_agent.scan import Hint, ScanQueue, Slice, look
from mergemem_agent.search import search
from mergemem_agent.targets import Pool, Target, Targets
from mergemem_agent.zero import zero_requests

Array = np.ndarray[Any, np.dtype[Any]]

log = logging.getLogger(__name__)

# A domain is searched for equal pages when an eighth of it has newly settled, when it has been
# waiting for this long, or, while the search is cheap, as soon as none of its regions is due.
INDEX_SECONDS: Final = 30.0
CHEAP_INDEX_PAGES: Final = 65536

# After NOMEM, merging rests: first for so long, then twice as long each time.
NOMEM_SECONDS: Final = 10.0
NOMEM_MAX_SECONDS: Final = 300.0


class Pipeline:
    """The path of pages from /proc to the kernel module, for one thread."""

    def __init__(
        self,
        policies: PolicySet,
        procfs: ProcFs,
        budget: Budget,
        pace: Callable[[], None],
        hints: Callable[[], Iterable[Hint]] = tuple,
    ) -> None:
        """Take the policies in force; `pace` is called between slices, `hints` once a round."""
        self.counts = Counts()
        self.targets = Targets(policies, procfs)
        self.queue = ScanQueue(self.targets, procfs)
        self._budget = budget
        self._pace = pace
        self._hints = hints
        self._settled: Counter[Pool] = Counter()  # pages since the last search
        self._searched: dict[Pool, float] = {}
        self._zeros = False  # some have settled
        self._synced = -float("inf")
        self._no_memory_until = 0.0
        self._no_memory_seconds = NOMEM_SECONDS

    def round(self, module: Module, limits: Limits) -> None:
        """Do all that is due now, stage by stage. Raises ModuleMissing, and what `pace` raises."""
        self.find_targets()
        self.queue.take_hints(self._hints())
        while not self._sync_is_due() and (work := self.queue.next(self._may_spend)):
            self._scan(module, limits, work)
        self._replace_zeros(module, limits)
        for pool in self._pools_to_search():
            targets, settled = self.targets.pool(pool), self._settled[pool]
            caps = Caps(self.targets.policies, self.memory())
            for request in search([target.regions for target in targets], pool.rules, limits):
                self._done("index", targets[0])
                self._merge_within(caps, module, targets, request)
            self._done("index", targets[0])
            self._searched[pool] = time.monotonic()
            self._settled[pool] -= settled
        self.counts.rounds += 1

    def find_targets(self) -> None:
        """Bring the targets in step with the policies and /proc, if it is time for that."""
        if self._sync_is_due():
            self._synced = time.monotonic()
            self.targets.sync()
            self._done("targets")

    def change_policies(self, policies: PolicySet, budget: Budget) -> None:
        """Go on with other policies; what is remembered of pages stays."""
        self._budget = budget
        self.targets.change_policies(policies)
        self._synced = time.monotonic()
        self.targets.sync()

    def forget_pages(self) -> None:
        """Start over: another load of the module computes other checksums."""
        for target in self.targets:
            target.regions, target.mapped = Regions(), 0.0
        self._settled.clear()
        self._zeros = False

    def memory(self) -> dict[str, PolicyMemory]:
        """Add up, by policy, what is remembered of the targets' memory."""
        totals = {policy.name: PolicyMemory() for policy in self.targets.policies.policies}
        for target in self.targets:
            total, rows = totals.get(target.policy.name, PolicyMemory()), target.regions.rows
            merged = int(rows["merged"].sum())
            saved_bytes = float(rows["saved_bytes"].sum(dtype=np.float64))
            totals[target.policy.name] = PolicyMemory(
                targets=total.targets + 1,
                remembered_pages=total.remembered_pages + target.regions.pages,
                merged_pages=total.merged_pages + merged,
                saved_bytes=total.saved_bytes + saved_bytes,
                # What a mapping does not save of its frame is its part of it.
                shared_bytes=total.shared_bytes + max(0.0, merged * PAGE_BYTES - saved_bytes),
                max_shared_bytes=target.policy.max_shared_bytes,
                zero_pages=total.zero_pages + int(rows["zero"].sum()),
                huge_pages=total.huge_pages + int(rows["huge"].sum()),
            )
        return totals

    def idle_seconds(self) -> float:
        """Return how long nothing will be due, at most until the next sync."""
        now = time.monotonic()
        due = self._synced + self.targets.policies.agent.rescan_seconds
        for target in self.targets:
            table = target.regions.rows["due"]
            wait = self._budget.policy_wait_seconds(target.policy.name)
            if len(table):
                due = min(due, max(float(table.min()), now + wait))
        return max(0.0, due - now)

    def _sync_is_due(self) -> bool:
        return time.monotonic() >= self._synced + self.targets.policies.agent.rescan_seconds

    def _may_spend(self, target: Target) -> bool:
        return self._budget.policy_wait_seconds(target.policy.name) == 0

    def _done(self, stage: str, target: Target | None = None) -> None:
        """Pay for a slice, then pause as the budget demands."""
        policy = target.policy.name if target else ""
        cpu_seconds = self._budget.charge(policy)
        self.counts.cpu_seconds[stage] += cpu_seconds
        if policy:
            self.counts.policy(policy).cpu_seconds += cpu_seconds
        self._pace()

    def _scan(self, module: Module, limits: Limits, work: Slice) -> None:
        target = work.target
        try:
            seen = look(module, work, limits.max_mappings)
        except (ModuleMissing, PermissionDenied):
            raise
        except ModuleFailure as failure:
            self._scan_failed(work, failure)
        else:
            counts = self.counts.policy(target.policy.name)
            counts.scanned += seen.scanned
            counts.checksummed += seen.checksummed
            counts.settled += seen.settled
            self._settled[target.pool] += seen.settled
            self._zeros |= seen.settled_zero > 0
        self._done("scan", target)

    def _pools_to_search(self) -> list[Pool]:
        now = time.monotonic()
        if now < self._no_memory_until:
            return []
        pages: Counter[Pool] = Counter()
        for target in self.targets:
            pages[target.pool] += target.regions.pages
        return [pool for pool in pages if self._worth_a_search(pool, pages[pool], now)]

    def _worth_a_search(self, pool: Pool, pages: int, now: float) -> bool:
        settled = self._settled[pool]
        if not settled:
            return False
        if settled * 8 >= pages or now - self._searched.get(pool, 0.0) >= INDEX_SECONDS:
            return True
        return pages <= settled * 256 + CHEAP_INDEX_PAGES and not self.queue.due_in(pool)

    def _replace_zeros(self, module: Module, limits: Limits) -> None:
        """Have the zero page take the place of settled zero-filled pages, whoever owns them."""
        if not self._zeros or time.monotonic() < self._no_memory_until:
            return
        self._zeros = False
        targets = [target for target in self.targets if target.policy.zero_pages]
        memories = [target.regions for target in targets]
        for request in zero_requests(memories, limits.max_candidates, limits.max_processes):
            self._merge(module, targets, request)

    def _merge_within(
        self, caps: Caps, module: Module, targets: list[Target], request: Request
    ) -> None:
        """Merge as much of a request as the policies' caps let through."""
        policies = [target.policy for target in targets]
        allowed, capped = caps.trim(request, policies)
        for name, pages in capped.items():
            self.counts.policy(name).capped += pages
        if capped:
            if not allowed.any():
                return
            request = request.only(allowed)
        results = self._merge(module, targets, request)
        if results is not None:
            caps.take(request, results, policies)

    def _merge(self, module: Module, targets: list[Target], request: Request) -> Array | None:
        """Send one request and take in its results; None: there are none."""
        if time.monotonic() < self._no_memory_until:
            return None
        named = [targets[index] for index in request.processes]
        undumpable = [t.process for t in named if t.policy.include_undumpable]
        self.counts.nominated[named[0].policy.domain.value] += len(request.candidates)
        results = None
        try:
            results = module.merge(
                [t.process for t in named],
                request.candidates,
                undumpable,
                any_node=named[0].policy.rules.any_node,
                split_percent=request.split_percent,
            )
        except (ModuleMissing, PermissionDenied):
            raise
        except ModuleFailure as failure:
            self._failed("merge", f"a merge request was refused: {failure.message}")
        else:
            outcome.count(self.counts, targets, request, results)
            outcome.remember(targets, request, results)
            self._heed(targets, results)
        self._done("merge", named[0])
        return results

    def _heed(self, targets: list[Target], results: Array) -> None:
        """Let results change what is done next."""
        crowded = int(np.count_nonzero(results == Result.MOREMAP))
        if crowded:
            self._settled[targets[0].pool] += crowded
        if np.isin(results, list(GONE)).any():
            self._synced = -float("inf")  # /proc tells who is gone
        self._rest_without_memory(results)

    def _rest_without_memory(self, results: Array) -> None:
        if (results == Result.NOMEM).any():
            self._no_memory_until = time.monotonic() + self._no_memory_seconds
            self._no_memory_seconds = min(self._no_memory_seconds * 2, NOMEM_MAX_SECONDS)
        elif (results == Result.SUCCESS).any():
            self._no_memory_seconds = NOMEM_SECONDS

    def _scan_failed(self, work: Slice, failure: ModuleFailure) -> None:
        """Drop a process that is gone, leave one alone that is refused, else try again later."""
        target = work.target
        if isinstance(failure, NoSuchProcess):
            self.targets.forget(target)
        elif isinstance(failure, AccessDenied):
            log.info("scan: process %d is left alone: %s", target.process.pid, failure.message)
            self.targets.refuse(target)
        else:
            rows = target.regions.rows[work.first : work.first + work.count]
            rows["due"] = time.monotonic() + target.policy.settle_seconds
            if not isinstance(failure, Busy):
                self._failed("scan", f"process {target.process.pid}: {failure.message}")

    def _failed(self, stage: str, message: str) -> None:
        """Count an error; the first of each stage is worth a line to its operator, then few."""
        self.counts.errors[stage] += 1
        level = logging.WARNING if self.counts.errors[stage] & 1023 == 1 else logging.DEBUG
        log.log(level, "%s: %s", stage, message)
