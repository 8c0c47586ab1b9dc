# SPDX-License-Identifier: MIT
"""Merging under the feet of threads that write, read, map and fork at random.

On two processors: one or two run writers, the other the merge. What each word must be is kept in
a shadow copy (actor_writers.h); a lost write, a stale read, a byte leaked into a neighbour, all
show there. Duration: MERGEMEM_WRITERS_SECONDS, 60 by default, most of it for the writers.
"""

from __future__ import annotations

import os
import random
from collections import Counter

from tests.kernel import race
from tests.kernel.actor import Region, Stage
from tests.kernel.contract import Result
from tests.kernel.sharing import flat, unless_busy
from tests.kernel.wire import Client
from tests.kernel.writers import Writers, merge_equal

SECONDS = float(os.environ.get("MERGEMEM_WRITERS_SECONDS", "60"))
PAGES = 768


def test_random_writers(stage: Stage, client: Client) -> None:
    regions = []
    for seed in range(2):
        actor = stage.start()
        regions.append(Region(actor, actor.map(PAGES), PAGES, seed))
    writers = Writers(regions, threads=2)
    results: Counter[Result] = Counter()
    chance = random.Random(1)

    def met() -> bool:
        # How much there is in a second is up to the machine.
        return (
            results[Result.SUCCESS] > 500
            and results[Result.NOTEQUAL] > 0
            and writers.have_done(10000)
        )

    for _ in race.rounds(0.7 * SECONDS, met, lambda: results):
        with unless_busy():
            results.update(merge_equal(client, regions))
        # And a few that are not equal: the kernel alone decides.
        liars = chance.sample([page for region in regions for page in region], 64)
        results.update(flat(client.merge(*zip(liars[::2], liars[1::2], strict=True))))
        # Sometimes all the way back.
        if not chance.randrange(8):
            region = chance.choice(regions)
            with unless_busy():
                client.unmerge(region.actor.key, region.address, PAGES)
    shared = client.info()
    writers.stop()
    print(f"{dict(results)}, at the end {shared.shared_mappings} mappings")
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
    results: Counter[Result] = Counter()

    def met() -> bool:
        said = [region.actor.ask("churn_so_far") for region in regions]
        assert all(rounds.isdecimal() for rounds in said), said
        return min(map(int, said)) > 5 and results[Result.SUCCESS] > 50

    for _ in race.rounds(0.3 * SECONDS, met, lambda: results):
        with unless_busy():
            results.update(merge_equal(client, regions))
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
    print(dict(results))
