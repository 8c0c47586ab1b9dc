# SPDX-License-Identifier: MIT
"""The stages of mergemem in order. Pipeline.round() is the function to read first.

    page fault ─► hint ─► scan queue ─► checksum ─► candidate index ─► merge ─► metrics
                          scan.py       kmod/       index.py           kmod/    metrics.py

Work is done in slices, and `pace` is called after each: it sleeps as the budget demands, and may
end the round there and then by an exception, since each slice leaves everything in order.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import numpy as np

from mergemem_agent.budget import Budget
from mergemem_agent.contract import Result
from mergemem_agent.counts import Counts, PolicyMemory
from mergemem_agent.index import nominate
from mergemem_agent.merge import GONE, JOINED, Request, freed_frames, requests
from mergemem_agent.module import (
    AccessDenied,
    Busy,
    Limits,
    Module,
    ModuleFailure,
    ModuleMissing,
    NoSuchProcess,
    PermissionDenied,
)
from mergemem_agent.policy import PolicySet
from mergemem_agent.procfs import ProcFs
from mergemem_agent.region import FULL, MERGED, SETTLED, Regions
from mergemem_agent.scan import Hint, ScanQueue, Slice, look
from mergemem_agent.targets import Target, Targets

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
        self._settled: Counter[str] = Counter()  # pages since the last search, by domain
        self._searched: dict[str, float] = {}
        self._synced = -float("inf")
        self._no_memory_until = 0.0
        self._no_memory_seconds = NOMEM_SECONDS

    def round(self, module: Module, limits: Limits) -> None:
        """Do all that is due now, stage by stage. Raises ModuleMissing, and what `pace` raises."""
        self.find_targets()
        self.queue.take_hints(self._hints())
        while not self._sync_is_due() and (work := self.queue.next(self._may_spend)):
            self._scan(module, limits, work)
        for domain in self._domains_to_search():
            targets, settled = self.targets.domain(domain), self._settled[domain]
            for nominated in nominate([target.regions for target in targets]):
                self._done("index", targets[0])
                for request in requests(nominated, limits.max_candidates, limits.max_processes):
                    self._merge(module, targets, request)
            self._done("index", targets[0])
            self._searched[domain] = time.monotonic()
            self._settled[domain] -= settled
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

    def memory(self) -> dict[str, PolicyMemory]:
        """Add up, by policy, what is remembered of the targets' memory."""
        totals = {policy.name: PolicyMemory() for policy in self.targets.policies.policies}
        for target in self.targets:
            total, rows = totals.get(target.policy.name, PolicyMemory()), target.regions.rows
            totals[target.policy.name] = PolicyMemory(
                targets=total.targets + 1,
                remembered_pages=total.remembered_pages + target.regions.pages,
                merged_pages=total.merged_pages + int(rows["merged"].sum()),
                saved_bytes=total.saved_bytes + float(rows["saved_bytes"].sum(dtype=np.float64)),
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
            self._settled[target.domain] += seen.settled
        self._done("scan", target)

    def _domains_to_search(self) -> list[str]:
        now = time.monotonic()
        if now < self._no_memory_until:
            return []
        pages: Counter[str] = Counter()
        for target in self.targets:
            pages[target.domain] += target.regions.pages
        return [domain for domain in pages if self._worth_a_search(domain, pages[domain], now)]

    def _worth_a_search(self, domain: str, pages: int, now: float) -> bool:
        settled = self._settled[domain]
        if not settled:
            return False
        if settled * 8 >= pages or now - self._searched.get(domain, 0.0) >= INDEX_SECONDS:
            return True
        return pages <= settled * 256 + CHEAP_INDEX_PAGES and not self.queue.due_in(domain)

    def _merge(self, module: Module, targets: list[Target], request: Request) -> None:
        if time.monotonic() < self._no_memory_until:
            return
        named = [targets[index] for index in request.processes]
        undumpable = [t.process for t in named if t.policy.include_undumpable]
        self.counts.nominated[named[0].policy.domain.value] += len(request.candidates)
        try:
            results = module.merge([t.process for t in named], request.candidates, undumpable)
        except (ModuleMissing, PermissionDenied):
            raise
        except ModuleFailure as failure:
            self._failed("merge", f"a merge request was refused: {failure.message}")
        else:
            self.counts.results.update(Result(code) for code in results.tolist())
            self.counts.freed_pages += freed_frames(request, results)
            self._remember(targets, request, results)
        self._done("merge", named[0])

    def _remember(self, targets: list[Target], request: Request, results: Array) -> None:
        """Let each result change what is remembered of its page.

        A page that joined its group is an anchor for others from now on. One that failed, for
        whatever reason, has to settle again: two more looks, with the back-off of its region. One
        that met a full frame stays nominated, and that frame's pages stop being anchors.
        """
        pages = request.nominated
        joined = np.isin(results, list(JOINED))
        crowded = results == Result.MOREMAP
        of_full_frame = joined & np.isin(
            request.candidates["group"], request.candidates["group"][crowded]
        )
        self._mark(targets, pages[joined], MERGED | SETTLED, 0)
        self._mark(targets, pages[of_full_frame], FULL, 0)
        self._mark(targets, pages[~joined & ~crowded], 0, SETTLED)
        if crowded.any():
            self._settled[targets[0].domain] += int(np.count_nonzero(crowded))
        self._revisit(targets, pages[results == Result.SUCCESS])
        if np.isin(results, list(GONE)).any():
            self._synced = -float("inf")  # /proc tells who is gone
        self._rest_without_memory(results)

    def _mark(self, targets: list[Target], pages: Array, set_flags: int, clear_flags: int) -> None:
        for target, number, here in _by_region(targets, pages):
            target.regions.mark(number, here["page"], set_flags, clear_flags)

    def _revisit(self, targets: list[Target], pages: Array) -> None:
        now = time.monotonic()
        for target, number, _ in _by_region(targets, pages):
            target.regions.revisit(number, now, target.policy.settle_seconds)

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


def _by_region(targets: list[Target], pages: Array) -> Iterator[tuple[Target, int, Array]]:
    """Split nominated pages by the region in which they lie."""
    if not len(pages):
        return
    pages = pages[np.lexsort((pages["number"], pages["process"]))]
    new_region = (np.diff(pages["number"]) != 0) | (np.diff(pages["process"]) != 0)
    for part in np.split(pages, np.flatnonzero(new_region) + 1):
        yield targets[int(part["process"][0])], int(part["number"][0]), part
