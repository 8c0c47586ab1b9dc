# SPDX-License-Identifier: MIT
"""Processes that write and read at random (actor_writers.h), and the merging under their feet.

What each word must be is kept in a shadow by the writers: a lost write, a stale read, a byte
leaked into a neighbour, all show there, at the latest when they are stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tests.kernel.actor import PAGE_BYTES, Page, Region
from tests.kernel.contract import MAX_CANDIDATES, Result, State
from tests.kernel.wire import Client


def equal_now(client: Client, regions: Iterable[Region]) -> list[list[Page]]:
    """Pages by checksum, where it occurs more than once."""
    found: dict[int, list[Page]] = {}
    for region in regions:
        for run in client.checksum(region.actor.key, region.address, region.pages):
            first = (run.address - region.address) // PAGE_BYTES
            wanted = np.isin(run.records["state"], [State.ANON, State.MERGED])
            for index in np.flatnonzero(wanted):
                checksum = int(run.records["checksum"][index])
                found.setdefault(checksum, []).append(region[first + int(index)])
    return [pages for pages in found.values() if len(pages) > 1]


def merge_equal(client: Client, regions: Iterable[Region]) -> list[Result]:
    """Merge what was equal a moment ago, as much as one request takes."""
    chosen = [
        (page, group) for group, pages in enumerate(equal_now(client, regions)) for page in pages
    ][:MAX_CANDIDATES]
    keys = list(dict.fromkeys(page.process for page, _ in chosen))
    candidates = [(page.address, keys.index(page.process), group) for page, group in chosen]
    return client.merge_candidates(keys, candidates) if candidates else []


class Writers:
    """One to eight threads in the process of each region, from now until they are stopped."""

    def __init__(self, regions: Sequence[Region], threads: int = 1) -> None:
        self.regions = regions
        for number, region in enumerate(regions):
            region.actor.ask("writers", region.address, region.pages, number + 1, threads)

    def have_done(self, least: int) -> bool:
        """Whether each process has written, and read, so often; and nothing was wrong so far."""
        return min(min(self._ask(region, "writers_so_far")) for region in self.regions) >= least

    def stop(self) -> None:
        """Stop them; a failed assertion if anything was ever wrong."""
        for region in self.regions:
            writes, reads = self._ask(region, "stop_writers")
            print(f"actor {region.actor.pid}: {writes} writes, {reads} reads")

    def _ask(self, region: Region, command: str) -> tuple[int, int]:
        writes, reads, *wrong = region.actor.ask(command).split(" ", 2)
        assert not wrong, wrong
        return int(writes), int(reads)
