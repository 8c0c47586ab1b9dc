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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from mergemem_agent import outcome
from mergemem_agent.batch import look
from mergemem_agent.budget import Budget
from mergemem_agent.cap import Caps
from mergemem_agent.contract import Result
from mergemem_agent.counts import Counts, PolicyMemory
from mergemem_agent.hint import Hint, ProcessEvents
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
from mergemem_agent.news import News
from mergemem_agent.order import Slice
from mergemem_agent.policy import PolicySet
from mergemem_agent.procfs import ProcFs
from mergemem_agent.region import Regions
from mergemem_agent.scan import ScanQueue
from mergemem_agent.search import Partners, search
from mergemem_agent.targets import Pool, Target, Targets
from mergemem_agent.window import Look
from mergemem_agent.zero import zero_requests

Array = np.ndarray[Any, np.dtype[Any]]

log = logging.getLogger(__name__)

# Hints are taken in at the start of a round, and so often while it lasts.
HINT_SECONDS: Final = 1.0

# A round scans for so long at most before it turns to what that has found: where memory is written
# to all the time, there is always something to scan.
SCAN_SECONDS: Final = 5.0

# With events of forks, execs and exits, /proc need not be read in full as often: in so many times
# the policy file's `rescan`.
FOLLOWED_RESCANS: Final = 6

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
        events: Callable[[], ProcessEvents | None] = lambda: None,
    ) -> None:
        """Take the policies in force; `pace` is called between slices, `hints` once a round.

        `events` returns None where /proc alone tells which processes there are.
        """
        self.counts = Counts()
        self.targets = Targets(policies, procfs)
        self.queue = ScanQueue(self.targets, procfs)
        self._budget = budget
        self._pace = pace
        self._hints = hints
        self._events = events
        self._news = News()
        self._tables_in_use = False  # by a search, or a list of requests in the making
        self._zeros = False  # some have settled
        self._synced = -float("inf")
        self._hinted = -float("inf")
        self._followed = False  # somebody tells of processes that come and go
        self._no_memory_until = 0.0
        self._no_memory_seconds = NOMEM_SECONDS
        self._memory: dict[str, PolicyMemory] | None = None

    def round(self, module: Module, limits: Limits) -> None:
        """Do all that is due now, stage by stage. Raises ModuleMissing, and what `pace` raises."""
        self.find_targets()
        self._take_hints()
        end = time.monotonic() + SCAN_SECONDS
        # At least once: where the budget makes a sync take longer than `rescan`, one is always due.
        while self._read_mappings() or self._scan(module, limits):
            if self._sync_is_due() or time.monotonic() >= end:
                break
            if time.monotonic() >= self._hinted + HINT_SECONDS:
                self._take_hints()
        self._replace_zeros(module, limits)
        for pool, samples in self._searches():
            self._search(module, limits, pool, samples)
        self.counts.rounds += 1

    def find_targets(self) -> None:
        """Bring the targets in step with events, the policies and /proc, as far as it is time."""
        self.follow_events()
        synced = self._sync_is_due()
        if synced:
            self._synced = time.monotonic()
            self.targets.sync()
            self._follow()
        if synced or self._followed:
            self._done("targets")

    def follow_events(self) -> bool:
        """Take in which processes came and went; may be called between slices.

        Returns whether there are other targets now than before.
        """
        events = self._events()
        self._followed = events is not None
        if events is None or not self.targets.take_events(events):
            return False
        self._follow()
        return True

    def change_policies(self, policies: PolicySet, budget: Budget) -> None:
        """Go on with other policies; what is remembered of pages stays."""
        self._budget = budget
        self.targets.change_policies(policies)
        self._synced = time.monotonic()
        self.targets.sync()
        self._follow()

    def forget_pages(self) -> None:
        """Start over: another load of the module computes other checksums."""
        for target in self.targets:
            target.regions, target.mapped = Regions(), 0.0
        self._follow()
        self._news.clear()
        self._zeros = False

    def memory(self) -> dict[str, PolicyMemory]:
        """Add up, by policy, what is remembered of the targets' memory."""
        if self._memory is None:
            parts: dict[str, list[Regions]] = {
                policy.name: [] for policy in self.targets.policies.policies
            }
            limits = {p.name: p.max_shared_bytes for p in self.targets.policies.policies}
            for target in self.targets:
                parts.setdefault(target.policy.name, []).append(target.regions)
                limits.setdefault(target.policy.name, target.policy.max_shared_bytes)
            self._memory = {
                name: PolicyMemory.of(regions, limits[name]) for name, regions in parts.items()
            }
        return self._memory

    def idle_seconds(self) -> float:
        """Return how long nothing will be due, at most until the next sync."""
        now = time.monotonic()
        sync = self._synced + self._sync_seconds
        work = self.queue.wait_seconds(now, self._budget.policy_wait_seconds)
        return max(0.0, min(sync - now, work))

    def _sync_is_due(self) -> bool:
        return time.monotonic() >= self._synced + self._sync_seconds

    @property
    def _sync_seconds(self) -> float:
        """How often /proc is read in full: rarely, where events tell of most of what happens."""
        seconds = self.targets.policies.agent.rescan_seconds
        return seconds * FOLLOWED_RESCANS if self._followed else seconds

    def _may_spend(self, target: Target) -> bool:
        return self._budget.policy_wait_seconds(target.policy.name) == 0

    def _done(self, stage: str, target: Target | None = None) -> None:
        """Pay for a slice, then pause as the budget demands."""
        self._paid(stage, target)
        self._pace()

    def _paid(self, stage: str, target: Target | None = None) -> float:
        """Pay for a slice, and return the CPU seconds that it took."""
        policy = target.policy.name if target else ""
        self._memory = None
        cpu_seconds = self._budget.charge(policy)
        self.counts.cpu_seconds[stage] += cpu_seconds
        if policy:
            self.counts.policy(policy).cpu_seconds += cpu_seconds
        return cpu_seconds

    def _follow(self) -> None:
        """Let go of what is known of processes that are no targets any more, if nobody uses it."""
        self._memory = None
        if self._tables_in_use:
            return
        for regions in self.queue.follow():
            regions.forget()
            self.counts.flow.take(regions)

    @contextmanager
    def _keep_tables(self) -> Iterator[None]:
        """Let nobody's tables go meanwhile: events may tell of the end of a process at any pace."""
        self._tables_in_use = True
        try:
            yield
        finally:
            self._tables_in_use = False
            self._follow()

    def _take_hints(self) -> None:
        self._hinted = time.monotonic()
        self.queue.take_hints(self._hints())

    def _read_mappings(self) -> bool:
        """Read the mappings of a few targets, if it is time for some."""
        if not self.queue.read_mappings(self._may_spend):
            return False
        self._done("scan")
        return True

    def _scan(self, module: Module, limits: Limits) -> bool:
        """Look at what promises most; False: nothing is due."""
        batch = self.queue.next(self._may_spend, self._budget.slice_seconds)
        if not batch:
            return False
        looked = look(module, batch, limits.max_mappings)
        for work, failure in looked.failed:
            self._scan_failed(work, failure)
        if looked.seen:
            self._take_in(looked.done, looked.seen)
            cpu_seconds = self._paid("scan", batch[0].target)
            self.queue.learn(looked.done, looked.seen, cpu_seconds)
        else:
            self._paid("scan", batch[0].target)
        self._pace()
        return True

    def _take_in(self, done: Sequence[Slice], seen: Look) -> None:
        target, counts = done[0].target, self.counts.policy(done[0].target.policy.name)
        counts.scanned += seen.scanned
        counts.sampled += seen.sampled
        counts.checksummed += seen.checksummed
        counts.settled += seen.settled
        counts.broken += seen.broken
        self._news.add(target.pool, seen.fresh, seen.deepened + seen.settled, seen.heads)
        self._zeros |= seen.settled_zero > 0
        for work in done:
            self.counts.flow.take(work.target.regions)

    def _searches(self) -> list[tuple[Pool, bool]]:
        """Return the pools that are worth a search, and whether by samples or less."""
        now = time.monotonic()
        if now < self._no_memory_until or not self._news:
            return []
        pages: Counter[Pool] = Counter()
        for target in self.targets:
            pages[target.pool] += target.regions.pages
        return self._news.searches(pages, self.queue.due_in, self.queue.search_rest_seconds)

    def _search(self, module: Module, limits: Limits, pool: Pool, samples: bool) -> None:
        """Search a pool for partners and for what has settled, and merge the latter."""
        targets = self.targets.pool(pool)
        if not targets:
            return  # it has ended while others were searched
        memories = [target.regions for target in targets]
        pages = sum(regions.pages for regions in memories)
        splits = pool.rules.split_percent is not None
        partners = Partners(memories, [target.policy.settle_seconds for target in targets])
        caps = Caps(self.targets.policies, self.memory())
        seconds, merged = 0.0, [regions.rows["merged"].copy() for regions in memories]
        try:
            with self._news.taken(pool, samples, splits) as heads, self._keep_tables():
                for request in search(memories, pool.rules, limits, partners, samples, heads):
                    seconds += self._paid("index", targets[0])
                    self._pace()
                    self._merge_within(caps, module, targets, request)
                self.queue.learn_merged(pool, memories, merged)
                seconds += self._paid("index", targets[0])
        finally:
            for regions in memories:
                self.counts.flow.take(regions)
        if heads is None:
            self.queue.costs.learn_search(seconds, pages)
        self._pace()

    def _replace_zeros(self, module: Module, limits: Limits) -> None:
        """Have the zero page take the place of settled zero-filled pages, whoever owns them."""
        if not self._zeros or time.monotonic() < self._no_memory_until:
            return
        self._zeros = False
        targets = [target for target in self.targets if target.policy.zero_pages]
        memories = [target.regions for target in targets]
        with self._keep_tables():
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
            self._news.owe(targets[0].pool)
            if not allowed.any():
                return
            request = request.only(allowed)
        results = self._merge(module, targets, request)
        if results is None or (results == Result.NOMEM).any():
            self._news.owe(targets[0].pool)
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
            for index in request.processes:
                self.counts.flow.take(targets[index].regions)
            self._heed(targets, results)
        self._done("merge", named[0])
        return results

    def _heed(self, targets: list[Target], results: Array) -> None:
        """Let results change what is done next."""
        counts = np.bincount(results, minlength=len(Result)).tolist()
        self.queue.success.learn(0, 0, counts[Result.SUCCESS])
        if crowded := counts[Result.MOREMAP]:
            self._news.add(targets[0].pool, deep=crowded)
        if any(counts[result] for result in GONE):
            self._synced = -float("inf")  # /proc tells who is gone
        if counts[Result.NOMEM]:
            self._no_memory_until = time.monotonic() + self._no_memory_seconds
            self._no_memory_seconds = min(self._no_memory_seconds * 2, NOMEM_MAX_SECONDS)
        elif counts[Result.SUCCESS]:
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
            rows["sample"] = time.monotonic() + target.policy.settle_seconds
            target.regions.put_off(work.first, work.count)
            if not isinstance(failure, Busy):
                self._failed("scan", f"process {target.process.pid}: {failure.message}")

    def _failed(self, stage: str, message: str) -> None:
        """Count an error; the first of each stage is worth a line to its operator, then few."""
        self.counts.errors[stage] += 1
        level = logging.WARNING if self.counts.errors[stage] & 1023 == 1 else logging.DEBUG
        log.log(level, "%s: %s", stage, message)
