# SPDX-License-Identifier: MIT
"""Merging under the feet of random writers while something else moves their memory about.

two actors, random writers in each     what each word must be is kept in a shadow
  ├── merged again and again            by the test
  └── disturbed again and again         by a thread: compaction, collapse, migration, ...
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from threading import Event, Thread

import numpy as np

from tests.kernel.actor import Page, Region
from tests.kernel.contract import MAX_CANDIDATES, Result, State
from tests.kernel.sharing import unless_busy
from tests.kernel.wire import Client

Disturb = Callable[[], object]


def equal_now(client: Client, regions: Iterable[Region]) -> dict[int, list[Page]]:
    """Pages by checksum, where it occurs more than once."""
    found: dict[int, list[Page]] = {}
    for region in regions:
        for run in client.checksum(region.actor.key, region.address, region.pages):
            first = (run.address - region.address) // 4096
            wanted = np.isin(run.records["state"], [State.ANON, State.MERGED])
            for index in np.flatnonzero(wanted):
                checksum = int(run.records["checksum"][index])
                found.setdefault(checksum, []).append(region[first + int(index)])
    return {checksum: pages for checksum, pages in found.items() if len(pages) > 1}


def merge_equal(client: Client, regions: Sequence[Region]) -> list[Result]:
    """Merge what is equal at the moment, as much as one request takes."""
    keys = [region.actor.key for region in regions]
    candidates = [
        (page.address, keys.index(page.process), group)
        for group, pages in enumerate(equal_now(client, regions).values())
        for page in pages
    ][:MAX_CANDIDATES]
    return client.merge_candidates(keys, candidates) if candidates else []


def merge_disturbed(
    client: Client, regions: Sequence[Region], disturb: Disturb, seconds: float
) -> tuple[Counter[Result], int]:
    """Start the writers, merge and disturb for a while; all bytes were right all the time.

    Returns what became of the candidates, and how often it was disturbed.
    """
    for seed, region in enumerate(regions):
        region.actor.ask("writers", region.address, region.pages, seed + 1, 1)
    stop, rounds = Event(), 0
    failures: list[BaseException] = []

    def disturb_on() -> None:
        nonlocal rounds
        try:
            while not stop.is_set():
                disturb()
                rounds += 1
        except BaseException as failure:
            failures.append(failure)

    thread = Thread(target=disturb_on)
    thread.start()
    results: Counter[Result] = Counter()
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            with unless_busy():
                results.update(merge_equal(client, regions))
    finally:
        stop.set()
        thread.join()
    assert not failures, failures
    for region in regions:
        writes, reads, *wrong = region.actor.ask("stop_writers").split(" ", 2)
        assert wrong in ([], [""]), wrong
        print(f"actor {region.actor.pid}: {writes} writes, {reads} reads")
    print(f"disturbed {rounds} times; {dict(results)}")
    # Or it was no test.
    assert rounds > 0
    assert results[Result.SUCCESS] > 100
    return results, rounds
