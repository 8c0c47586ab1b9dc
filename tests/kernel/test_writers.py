# SPDX-License-Identifier: MIT
"""Merging under the feet of threads that write, read, map and fork at random.

On two processors: one or two run writers, the other the merge. What each word must be is kept in
a shadow copy (actor_writers.h); a lost write, a stale read, a byte leaked into a neighbour, all
show there. Duration: MERGEMEM_WRITERS_SECONDS, 60 by default, most of it for the writers.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from tests.kernel.actor import Page, Region, Stage
from tests.kernel.contract import MAX_CANDIDATES, Result, State
from tests.kernel.sharing import flat, unless_busy
from tests.kernel.wire import Client

SECONDS = float(os.environ.get("MERGEMEM_WRITERS_SECONDS", "60"))
PAGES = 768


def equal_now(client: Client, regions: Iterable[Region]) -> list[tuple[Page, int]]:
    """Pages and the number of their checksum, for those whose checksum occurs more than once."""
    pages: list[Page] = []
    sums: list[int] = []
    for region in regions:
        for run in client.checksum(region.actor.key, region.address, region.pages):
            first = (run.address - region.address) // 4096
            wanted = np.isin(run.records["state"], [State.ANON, State.MERGED])
            for index in np.flatnonzero(wanted):
                pages.append(region[first + int(index)])
                sums.append(int(run.records["checksum"][index]))
    _, inverse, counts = np.unique(sums, return_inverse=True, return_counts=True)
    return [
        (page, int(group))
        for page, group in zip(pages, inverse.tolist(), strict=True)
        if counts[group] > 1
    ]


def nominate(client: Client, nominated: Sequence[tuple[Page, int]]) -> list[Result]:
    """MERGE of pages that were found equal a moment ago, as many as a request takes."""
    chosen = nominated[:MAX_CANDIDATES]
    keys = list(dict.fromkeys(page.process for page, _ in chosen))
    index = {key: number for number, key in enumerate(keys)}
    groups = {group: number for number, group in enumerate({group for _, group in chosen})}
    candidates = [(page.address, index[page.process], groups[group]) for page, group in chosen]
    return client.merge_candidates(keys, candidates)


def test_random_writers(stage: Stage, client: Client) -> None:
    regions = []
    for seed in range(2):
        actor = stage.start()
        regions.append(Region(actor, actor.map(PAGES), PAGES, seed))
        actor.ask("writers", regions[-1].address, PAGES, seed + 1, 2)
    deadline = time.monotonic() + 0.7 * SECONDS
    results: Counter[Result] = Counter()
    chance = random.Random(1)
    rounds = 0
    while time.monotonic() < deadline:
        with unless_busy():
            results.update(nominate(client, equal_now(client, regions)))
        # And a few that are not equal: the kernel alone decides.
        liars = chance.sample([page for region in regions for page in region], 64)
        results.update(flat(client.merge(*zip(liars[::2], liars[1::2], strict=True))))
        # Sometimes all the way back.
        if not chance.randrange(8):
            region = chance.choice(regions)
            with unless_busy():
                client.unmerge(region.actor.key, region.address, PAGES)
        rounds += 1
    shared = client.info()
    for region in regions:
        writes, reads, *wrong = region.actor.ask("stop_writers").split(" ", 2)
        print(f"actor {region.actor.pid}: {writes} writes, {reads} reads")
        assert wrong in ([], [""]), wrong
        # Or it was no test; how much there is in a second is up to the machine.
        assert int(writes) > 10000
        assert int(reads) > 10000
    print(f"{rounds} rounds, {dict(results)}, at the end {shared.shared_mappings} mappings")
    assert results[Result.SUCCESS] > 500
    assert results[Result.NOTEQUAL] > 0
    assert set(results) <= {
        Result.SUCCESS,
        Result.ALREADYSH,
        Result.NOTEQUAL,
        Result.ALONE,
        Result.PINNED,
        Result.BUSY,
    }


def test_churn(stage: Stage, client: Client) -> None:
    """Mappings that come and go, move, are forked and discarded, in two processes."""
    pages = 96
    regions = []
    for _ in range(2):
        actor = stage.start()
        # Three times as large: it moves within.
        regions.append(Region(actor, actor.map(3 * pages), 3 * pages, 0))
        actor.ask("churn", regions[-1].address, pages)
    deadline = time.monotonic() + 0.3 * SECONDS
    results: Counter[Result] = Counter()
    while time.monotonic() < deadline:
        with unless_busy():
            if nominated := equal_now(client, regions):
                results.update(nominate(client, nominated))
        every = [page for region in regions for page in region]
        results.update(
            client.merge_candidates(
                [region.actor.key for region in regions],
                [(page.address, n // (3 * pages), n % 4) for n, page in enumerate(every)],
            )
        )
    for region in regions:
        rounds, *wrong = region.actor.ask("stop_churn").split(" ", 1)
        print(f"actor {region.actor.pid}: {rounds} rounds")
        assert not wrong, wrong
        assert int(rounds) > 5
    print(dict(results))
    assert results[Result.SUCCESS] > 50
