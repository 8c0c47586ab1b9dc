# SPDX-License-Identifier: MIT
"""What a scan reads, to the page: the agent's stages on real processes, counted by the module.

    each of three processes:   unique | common | joined | nothing
                               U        D        J

The common pages are equal in all three. So are the joined ones, but those of the first two are
merged before the scan begins. For N = 3 U + 3 D + 3 J pages the scan reads

    samples     3 U + 3 D + J     all but the merged ones
    in full     2 (3 D + J) + 2 J twice what has a partner, once what was merged by somebody else

and later only samples of the unique pages. A page that the kernel did not merge, since it was in
use just then, is read in full once more.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from mergemem_agent.budget import Budget
from mergemem_agent.module import Module as AgentModule
from mergemem_agent.pipeline import Pipeline
from mergemem_agent.policy import DomainKind, Glob, Policy, PolicySet, Selector
from mergemem_agent.procfs import Mapping, ProcFs
from tests.kernel.actor import PAGE_BYTES, Region, Stage
from tests.kernel.contract import Result
from tests.kernel.sharing import DEADLINE_SECONDS, flat, pairs
from tests.kernel.wire import Client

UNIQUE, COMMON, JOINED = 600, 200, 100
WINDOW_PAGES = 1024
WINDOW_BYTES = WINDOW_PAGES * PAGE_BYTES
# The first samples are taken again after eight times as long: far later than all else is done.
SETTLE_SECONDS = 6.0
SEED = 700


class Window:
    """Two whole regions of 2 MiB of one process, in which nothing else is mapped."""

    def __init__(self, stage: Stage, number: int) -> None:
        self.actor = stage.start()
        start = self.actor.map(3 * WINDOW_PAGES)
        self.address = -(-start // WINDOW_BYTES) * WINDOW_BYTES
        self.unique = self._fill(0, UNIQUE, SEED + 1 + number)
        self.common = self._fill(UNIQUE, COMMON, SEED)
        self.joined = self._fill(UNIQUE + COMMON, JOINED, SEED + 100)

    def _fill(self, first: int, pages: int, seed: int) -> Region:
        region = Region(self.actor, self.address + first * PAGE_BYTES, pages, seed)
        self.actor.ask("fill", region.address, pages, seed)
        return region

    def verify(self) -> None:
        """Every byte is what it was filled with."""
        for region in (self.unique, self.common, self.joined):
            region.verify()


class WindowsOnly(ProcFs):
    """/proc, in which processes have nothing but their windows."""

    def __init__(self, windows: list[Window]) -> None:
        super().__init__()
        self._windows = windows

    def mappings(
        self,
        pid: int,
        with_flags: bool = False,  # noqa: ARG002
        anonymous: bool = False,  # noqa: ARG002
    ) -> list[Mapping]:
        return [
            Mapping(each.address, each.address + WINDOW_BYTES, "rw-p", 0, "", frozenset())
            for each in self._windows
            if each.actor.pid == pid
        ]


class Scan:
    """The agent's pipeline over some windows, and what the module has read for it."""

    def __init__(self, client: Client, windows: list[Window]) -> None:
        self._client = client
        actors = Policy(
            "actors",
            Selector(executable=Glob("**/build/actor")),
            domain=DomainKind.HOST,
            settle_seconds=SETTLE_SECONDS,
        )
        self.pipeline = Pipeline(
            PolicySet(policies=(actors,)), WindowsOnly(windows), Budget(100.0, {}), lambda: None
        )
        self.module = AgentModule()
        self._limits = self.module.info().limits
        self._before = self._counters()

    def _counters(self) -> tuple[int, int]:
        counters = self._client.info().counters
        return counters["sampled_pages"], counters["checksummed_pages"]

    def read(self) -> tuple[int, int]:
        """Pages sampled, and pages read in full, since this was asked last."""
        now = self._counters()
        read = now[0] - self._before[0], now[1] - self._before[1]
        self._before = now
        return read

    def failed(self) -> int:
        """Nominated pages that were not merged, such as one in use: each is read once more."""
        results = self.pipeline.counts.results.items()
        return sum(n for result, n in results if result.name not in ("SUCCESS", "ALREADYSH"))

    def rounds_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "rounds led to nothing"
            self.pipeline.round(self.module, self._limits)
            time.sleep(min(0.5, self.pipeline.idle_seconds()))

    def look_at_all(self) -> None:
        """One round in which every region is due for a sample."""
        for target in self.pipeline.targets:
            target.regions.rows["sample"] = 0.0
            target.regions.schedule(time.monotonic(), SETTLE_SECONDS)
        self.pipeline.round(self.module, self._limits)


def shared(*regions: Region) -> bool:
    first = regions[0].frames
    return all(bool((region.frames == first).all()) for region in regions[1:])


def test_what_a_scan_reads(stage: Stage, client: Client) -> None:
    windows = [Window(stage, number) for number in range(3)]
    alice, bob, _ = windows
    assert set(flat(client.merge(*pairs(alice.joined, bob.joined)))) == {Result.SUCCESS}
    scan = Scan(client, windows)
    scan.rounds_until(
        lambda: shared(*(w.common for w in windows)) and shared(*(w.joined for w in windows))
    )
    sampled = 3 * UNIQUE + 3 * COMMON + JOINED
    in_full = 2 * (3 * COMMON + JOINED) + 2 * JOINED
    failed = scan.failed()
    assert scan.read() == (sampled, in_full + failed), scan.pipeline.counts.results

    # Merged pages are counted from now on, and not read.
    scan.look_at_all()
    assert scan.read() == (3 * UNIQUE, 0)
    memory = scan.pipeline.memory()["actors"]
    assert memory.merged_pages == 3 * (COMMON + JOINED)
    assert memory.remembered_pages == 3 * (UNIQUE + COMMON + JOINED)

    # A new worker: what it has in common with the others joins them, read in full twice.
    windows.append(Window(stage, 3))
    scan.rounds_until(
        lambda: shared(*(w.common for w in windows)) and shared(*(w.joined for w in windows))
    )
    in_full = 2 * (COMMON + JOINED) + scan.failed() - failed
    assert scan.read() == (UNIQUE + COMMON + JOINED, in_full), scan.pipeline.counts.results
    assert scan.failed() < 10
    for window in windows:
        window.verify()
    scan.module.close()
