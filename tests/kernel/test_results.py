# SPDX-License-Identifier: MIT
"""Result codes, each provoked on purpose, and the rule that a bad page never fails its neighbours.

    group 0:  [bad]  alice[0]  bob[0]  [or bad]      one page that cannot be merged
    group 1:         alice[1]  bob[1]                a group that has nothing to do with it

SUCCESS, ALREADYSH, ALONE, MOREMAP and NOMEM, which are not about one bad page, are in test_merge.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.kernel import frames
from tests.kernel.actor import Page, Region, Stage
from tests.kernel.contract import Result
from tests.kernel.sharing import DEADLINE_SECONDS, flat, pairs, wait_until
from tests.kernel.wire import Client

SEED = 20
# The page, and the region to verify afterwards, if its process is still there.
Bad = tuple[Page, Region | None]


def gone(stage: Stage) -> Bad:
    actor = stage.start()
    page = actor.region(1, SEED)[0]
    actor.exit()
    return page, None


def untouched(stage: Stage) -> Bad:
    actor = stage.start()
    return Region(actor, actor.map(1), 1, SEED)[0], None


def unmapped(stage: Stage) -> Bad:
    region = stage.start().region(1, SEED)
    region.actor.ask("munmap", region.address, 1)
    return region[0], None


def zero_page(stage: Stage) -> Bad:
    actor = stage.start()
    region = Region(actor, actor.map(1), 1, SEED)
    actor.ask("touch", region.address, 1)
    assert frames.has_flag(region[0].frame, frames.KPF_ZERO_PAGE)
    return region[0], None


def different(stage: Stage) -> Bad:
    region = stage.start().region(1, SEED + 1)
    return region[0], region


def different_in_the_last_byte(stage: Stage) -> Bad:
    region = stage.start().region(1, SEED)
    last = region.address + 4095
    region.actor.ask("write", last, int(region.actor.ask("read", last)) ^ 1)
    return region[0], None


def lent_to_a_pipe(stage: Stage) -> Bad:
    region = stage.start().region(1, SEED)
    region.actor.ask("vmsplice", region.address, 1)
    return region[0], region


def of_a_file(stage: Stage) -> Bad:
    region = stage.start().region(1, SEED, kind="memfd")
    return region[0], region


def of_another_user(stage: Stage) -> Bad:
    region = stage.start(uid=1234).region(1, SEED)
    return region[0], region


def in_a_huge_page(stage: Stage) -> Bad:
    region = stage.start().region(512, SEED, kind="huge")
    assert frames.has_flag(region[0].frame, frames.KPF_THP)
    return region[0], region


CASES: list[tuple[Result, Callable[[Stage], Bad], bool]] = [
    (Result.NOTASK1, gone, True),
    (Result.NOTASK2, gone, False),
    (Result.NOPAGE1, untouched, True),
    (Result.NOPAGE2, untouched, False),
    (Result.NOPAGE1, unmapped, True),
    (Result.NOPAGE2, unmapped, False),
    (Result.NOPAGE2, zero_page, False),
    (Result.NOTEQUAL, different, False),
    (Result.NOTEQUAL, different_in_the_last_byte, False),
    (Result.PINNED, lent_to_a_pipe, False),
    (Result.REFUSED, of_a_file, True),
    (Result.REFUSED, of_a_file, False),
    (Result.DOMAIN, of_another_user, False),
    (Result.HUGE, in_a_huge_page, True),
    (Result.HUGE, in_a_huge_page, False),
]


@pytest.mark.parametrize(("result", "make_bad", "first"), CASES)
def test_bad_page_and_its_neighbours(
    stage: Stage, client: Client, result: Result, make_bad: Callable[[Stage], Bad], first: bool
) -> None:
    # The donor is the first viable page in the order of processes; make that a good one.
    alice, bob = (stage.start().region(2, SEED) for _ in range(2))
    bad, bad_region = make_bad(stage)
    group = [alice[0], bob[0]]
    frames.assert_distinct([*group, alice[1], bob[1]])
    before = bad_region[0].frame if bad_region else 0
    results = client.merge([bad, *group] if first else [*group, bad], [alice[1], bob[1]])

    assert results[0].pop(0 if first else 2) is result
    assert results == [[Result.SUCCESS] * 2] * 2
    frames.assert_shared(group)
    frames.assert_shared([alice[1], bob[1]])
    alice.verify()
    bob.verify()
    if bad_region:
        assert bad_region[0].frame == before
        bad_region.verify()
        # Nothing about it has changed: it can still be written to, in place.
        bad_region.write(0, 1)
        assert bad_region[0].frame == before or result is Result.PINNED


def test_busy(stage: Stage, client: Client) -> None:
    """A process whose mmap_lock is held for writing nearly all of the time."""
    alice, bob, hog = (stage.start().region(2, SEED) for _ in range(3))
    hog.actor.ask("hog")
    results: list[list[Result]] = []

    def merged_all_but_one() -> bool:
        results[:] = client.merge([alice[0], bob[0], hog[0]], [alice[1], bob[1]])
        assert results[0][2] in (Result.BUSY, Result.SUCCESS, Result.ALREADYSH)
        if results[0][2] is not Result.BUSY:
            hog.write(0, 0)
            hog.write(0, hog.original(0))
        return results[0][2] is Result.BUSY

    wait_until(merged_all_but_one, f"a process is busy, in {DEADLINE_SECONDS} s")
    hog.actor.ask("stop_hog")
    frames.assert_shared([alice[0], bob[0]])
    frames.assert_shared([alice[1], bob[1]])
    assert hog[0].frame != alice[0].frame
    for region in (alice, bob, hog):
        region.verify()


def test_thousand_pages_and_every_other_one_bad(stage: Stage, client: Client) -> None:
    """Batches with holes: what was cleared and put back is exactly as it was."""
    alice, bob = (stage.start().region(1000, SEED) for _ in range(2))
    bob.actor.ask("flip", bob.address, 1000, 2)
    before_alice, before_bob = alice.frames, bob.frames
    results = client.merge(*pairs(alice, bob))
    for mine, yours in results[0::2]:
        assert {mine, yours} == {Result.ALONE, Result.NOTEQUAL}
    assert set(flat(results[1::2])) == {Result.SUCCESS}
    assert (alice.frames[0::2] == before_alice[0::2]).all()
    assert (bob.frames[0::2] == before_bob[0::2]).all()
    assert (alice.frames[1::2] == bob.frames[1::2]).all()
    assert len(np.unique(alice.frames)) == 1000
    alice.verify()
    # Their entries are what they were, too: still writable, so that a write takes no fault.
    faults = bob.actor.minor_faults()
    bob.actor.ask("flip", bob.address, 1000, 2)
    assert bob.actor.minor_faults() - faults < 100
    assert (bob.frames[0::2] == before_bob[0::2]).all()
    bob.verify()


@pytest.mark.parametrize("odd_ones", [1, 2])
def test_odd_ones_come_first(stage: Stage, client: Client, odd_ones: int) -> None:
    """The first page is copied and compared with; when it is the bad one, others still merge."""
    odd = [stage.start().region(1, SEED + 1 + n) for n in range(odd_ones)]
    alice, bob = (stage.start().region(1, SEED) for _ in range(2))
    before = [region[0].frame for region in odd]
    (results,) = client.merge([*[region[0] for region in odd], alice[0], bob[0]])
    assert results[odd_ones:] == [Result.SUCCESS, Result.SUCCESS]
    assert set(results[:odd_ones]) <= {Result.ALONE, Result.NOTEQUAL}
    assert [region[0].frame for region in odd] == before
    frames.assert_shared([alice[0], bob[0]])
    for region in (*odd, alice, bob):
        region.verify()


def test_all_codes_are_provoked() -> None:
    """Here, in test_merge, test_zero or test_numa; a new code needs a test."""
    in_test_merge = {Result.SUCCESS, Result.ALREADYSH, Result.ALONE, Result.MOREMAP, Result.NOMEM}
    elsewhere = in_test_merge | {Result.BUSY, Result.ZEROED, Result.NODE}
    assert {result for result, _, _ in CASES} | elsewhere == set(Result)
