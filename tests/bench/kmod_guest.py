# SPDX-License-Identifier: MIT
"""The cost of one merge, inside the guest: KSM and mergemem on identical pages, in turn.

    python -m tests.bench.kmod_guest DIRECTORY

Started by kmod.py, which makes figures of the facts that this leaves in the directory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench import replay, tracing
from tests.bench.ksmd import Ksmd
from tests.kernel.actor import MADV_MERGEABLE, Region, Stage
from tests.kernel.contract import DEPTH_FULL_BYTES, Result
from tests.kernel.module import Module
from tests.kernel.wire import Client, Info

PROCESSES = 4
PAGES_EACH = 2048
GROUPS_PER_REQUEST = 1000
ROUNDS = 5
SAMPLE_BYTES = 256
SPLIT_GROUPS, SPLIT_PERCENT = 512, 25
MMAP_LOCK_EVENTS = tuple(
    tracing.ROOT / "events/mmap_lock" / name
    for name in ("mmap_lock_acquire_returned", "mmap_lock_released")
)
# At the entry of a function its caller is on top of the stack.
LOCK = "_raw_spin_lock lock=%di caller=$stack0:symbol"
UNLOCK = "_raw_spin_unlock lock=%di"
FLUSH = "flush_tlb_mm_range"
# What ksmd does with a page once it has found an equal one; none of these calls another.
KSM_MERGING = ("try_to_merge_with_ksm_page", "stable_tree_insert", "stable_tree_append")


def regions(stage: Stage, seeds: Sequence[int], kind: str = "private") -> list[Region]:
    """One fresh process for each seed; equal seeds, equal pages."""
    return [stage.start().region(PAGES_EACH, seed, kind=kind) for seed in seeds]


def opt_in(fleet: Sequence[Region]) -> None:
    """What KSM needs and mergemem does not."""
    for region in fleet:
        region.actor.ask("madvise", region.address, region.pages, MADV_MERGEABLE)


def frames_used(fleet: Sequence[Region]) -> int:
    """How many frames the processes have between them; all their pages must be in memory."""
    found = np.concatenate([region.frames for region in fleet])
    assert found.all(), "a page is not in memory"
    return len(np.unique(found))


def assert_merged(fleet: Sequence[Region], expected_frames: int) -> None:
    """The frames are as few as they can be, and every byte is what it was."""
    found = frames_used(fleet)
    assert found == expected_frames, f"{found} frames are left, not {expected_frames}"
    for region in fleet:
        region.verify()


class Bench:
    """What all measurements share."""

    def __init__(self, directory: Path, client: Client, ksmd: Ksmd) -> None:
        self.directory = directory
        self.client = client
        self.ksmd = ksmd
        self.family = client.family
        self.seed = 1000

    def requests(self) -> replay.Requests:
        return replay.Requests(self.family)

    def equal_seeds(self) -> list[int]:
        self.seed += 1
        return [self.seed] * PROCESSES

    def different_seeds(self) -> list[int]:
        self.seed += PROCESSES
        return list(range(self.seed - PROCESSES + 1, self.seed + 1))

    # ---- CPU time of a merge ----

    def ksm_passes(self, seeds: Sequence[int]) -> list[int]:
        """CPU of ksmd's first three passes over fresh processes."""
        with Stage() as stage:
            fleet = regions(stage, seeds)
            before = frames_used(fleet)
            assert before == PROCESSES * PAGES_EACH
            opt_in(fleet)
            passes = [self.ksmd.one_pass() for _ in range(3)]
            expected = PAGES_EACH * len(set(seeds))
            if len(set(seeds)) == 1:
                assert self.ksmd.merged_pages() == before
            self.ksmd.stop()
            assert_merged(fleet, expected)
        return passes

    def merge(self) -> dict[str, int]:
        """CPU of the MERGE requests over fresh processes."""
        with Stage() as stage:
            fleet = regions(stage, self.equal_seeds())
            assert frames_used(fleet) == PROCESSES * PAGES_EACH
            requests = self.merge_requests(fleet)
            before = self.client.info()
            sent = requests.send()
            after = self.client.info()
            assert_merged(fleet, PAGES_EACH)
        success = after.results[Result.SUCCESS] - before.results[Result.SUCCESS]
        assert success == PROCESSES * PAGES_EACH, f"{success} pages were merged"
        return {"cpu_ns": sum(sent.cpu_ns), "pages": success} | _deltas(before, after)

    def cpu_round(self, number: int) -> dict[str, Any]:
        """All of it once, in an order that changes from round to round."""
        facts: dict[str, Any] = {}
        steps = {
            "ksm_scan_only_passes_ns": lambda: self.ksm_passes(self.different_seeds()),
            "ksm_merge_passes_ns": lambda: self.ksm_passes(self.equal_seeds()),
            "mergemem": self.merge,
        }
        names = list(steps)
        for name in names[number % 3 :] + names[: number % 3]:
            facts[name] = steps[name]()
        return facts

    def ksm_graph(self) -> list[str]:
        """The merging functions of ksmd alone, timed."""
        names = tracing.traceable(KSM_MERGING)
        assert len(names) > 1, f"this kernel has inlined what merges: {names}"
        with Stage() as stage:
            fleet = regions(stage, self.equal_seeds())
            opt_in(fleet)
            self.ksmd.one_pass()
            with tracing.timed(names, self.ksmd.pid, self.directory / "ksm.graph"):
                self.ksmd.one_pass()
            self.ksmd.stop()
            assert_merged(fleet, PAGES_EACH)
        return names

    # ---- TLB flushes ----

    def flushes(self) -> dict[str, int]:
        """Calls that flush a range of a process from all TLBs: by ksmd, by the requests."""
        with (
            Stage() as stage,
            tracing.probe("flush", FLUSH) as event,
            tracing.counted(event) as counts,
        ):
            fleet = regions(stage, self.equal_seeds())
            opt_in(fleet)
            self.ksmd.one_pass()
            self.ksmd.one_pass()
            self.ksmd.stop()
            assert_merged(fleet, PAGES_EACH)
            fleet = regions(stage, self.equal_seeds())
            pids: list[int] = []
            self.merge_requests(fleet).send(pids.append)
            assert_merged(fleet, PAGES_EACH)
        return {
            "ksm": counts.get(self.ksmd.pid, 0),
            "mergemem": counts.get(pids[0], 0),
            "pages": PROCESSES * PAGES_EACH,
        }

    # ---- locks ----

    def locks(self) -> dict[str, Any]:
        """Traces of the locks that each kind of request holds; locks.py reads them."""
        with Stage() as stage, ExitStack() as probes:
            lock = probes.enter_context(tracing.probe("lock", LOCK))
            unlock = probes.enter_context(tracing.probe("unlock", UNLOCK))
            self.events = [*MMAP_LOCK_EVENTS, lock, unlock]
            small = regions(stage, self.equal_seeds())
            huge = regions(stage, self.equal_seeds(), "huge")
            facts: dict[str, Any] = {
                "CHECKSUM, full": self.locked("checksum", self.checksum_requests(small)),
                "CHECKSUM, 256 bytes": self.locked(
                    "sample", self.checksum_requests(small, SAMPLE_BYTES)
                ),
                "CHECKSUM of huge pages, full": self.locked(
                    "checksum-huge", self.checksum_requests(huge)
                ),
                "MERGE": self.locked("merge", self.merge_requests(small)),
            }
            assert_merged(small, PAGES_EACH)
            facts["UNMERGE"] = self.locked("unmerge", self.unmerge_requests(small))
            assert_merged(small, PROCESSES * PAGES_EACH)
            before = self.client.info().counters.get("split_folios", 0)
            requests = self.requests()
            requests.merge_split(huge, SPLIT_GROUPS, SPLIT_PERCENT)
            facts["MERGE with splitting"] = self.locked("split", requests)
            facts["split_folios"] = self.client.info().counters.get("split_folios", 0) - before
            for region in huge:
                region.verify()
            assert facts["split_folios"], "no huge page was split"
        return facts

    def locked(self, name: str, requests: replay.Requests) -> str:
        """Send requests under the tracer; the name of the trace."""
        with ExitStack() as tracer:
            requests.send(
                lambda pid: tracer.enter_context(
                    tracing.recorded(self.events, pid, self.directory / f"{name}.trace")
                )
            )
        return f"{name}.trace"

    def checksum_requests(
        self, fleet: Sequence[Region], depth: int = DEPTH_FULL_BYTES
    ) -> replay.Requests:
        requests = self.requests()
        for region in fleet:
            requests.checksum(region, depth)
        return requests

    def merge_requests(self, fleet: Sequence[Region]) -> replay.Requests:
        requests = self.requests()
        requests.merge(fleet, GROUPS_PER_REQUEST)
        return requests

    def unmerge_requests(self, fleet: Sequence[Region]) -> replay.Requests:
        requests = self.requests()
        for region in fleet:
            requests.unmerge(region)
        return requests

    # ---- checksums ----

    def checksums(self) -> dict[str, Any]:
        """CPU of checksums, in full and of a sample, over the same pages in turn."""
        facts: dict[str, Any] = {"full_ns": [], "sampled_ns": [], "pages": PROCESSES * PAGES_EACH}
        with Stage() as stage:
            fleet = regions(stage, self.different_seeds())
            for _ in range(ROUNDS):
                for name, depth in (("full_ns", DEPTH_FULL_BYTES), ("sampled_ns", SAMPLE_BYTES)):
                    requests = self.checksum_requests(fleet, depth)
                    before = self.client.info()
                    sent = requests.send()
                    done = _deltas(before, self.client.info())
                    kind = "checksummed_pages" if name == "full_ns" else "sampled_pages"
                    assert done[kind] == facts["pages"], done
                    facts[name].append(sum(sent.cpu_ns))
        return facts


def _deltas(before: Info, after: Info) -> dict[str, int]:
    return {name: after.counters[name] - before.counters[name] for name in after.counters}


def main() -> int:
    directory = Path(sys.argv[1])
    Path("/sys/kernel/mm/transparent_hugepage/enabled").write_text("madvise")
    Module().reload()
    with Client() as client, Ksmd() as ksmd:
        bench = Bench(directory, client, ksmd)
        facts: dict[str, Any] = {"checksums": bench.checksums()}
        print(facts, flush=True)
        facts["rounds"] = []
        for number in range(ROUNDS):
            facts["rounds"].append(bench.cpu_round(number))
            print(facts["rounds"][-1], flush=True)
        facts["flushes"] = bench.flushes()
        print(facts["flushes"], flush=True)
        facts["ksm_functions"] = bench.ksm_graph()
        facts["locks"] = bench.locks()
    (directory / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
