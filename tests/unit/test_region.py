# SPDX-License-Identifier: MIT
"""What is remembered of a page between two looks, and when a region is looked at next."""

from typing import Any

import numpy as np
import pytest

from mergemem_agent.contract import RECORD, State
from mergemem_agent.region import (
    FULL,
    HUGE,
    MAX_INTERVAL_SECONDS,
    MERGED,
    REGION_PAGES,
    SETTLED,
    ZERO,
    Look,
    Regions,
    Wanted,
    map_count_of,
    page_of,
)

SETTLE = 10.0


def records(*pages: tuple[int, int, int, State], count: int = 1) -> np.ndarray[Any, np.dtype[Any]]:
    """Return records of `count` regions from (page, checksum, map count, state)."""
    result = np.zeros(count * REGION_PAGES, dtype=RECORD)
    for page, checksum, map_count, state in pages:
        result[page] = (checksum << 22, map_count, state, 0)
    return result


def regions(*numbers: int) -> Regions:
    result = Regions()
    result.replace(np.array(numbers, dtype=np.uint64))
    return result


def look(known: Regions, now: float, *pages: tuple[int, int, int, State]) -> Look:
    return known.look(0, 1, records(*pages), now, SETTLE, 100)


def flags(known: Regions, row: int = 0) -> dict[int, int]:
    words = np.frombuffer(known.words[row], dtype=np.uint64)
    return dict(zip(page_of(words).tolist(), (words & np.uint64(31)).tolist(), strict=True))


def test_a_page_settles_by_two_equal_looks_far_enough_apart() -> None:
    known = regions(1)
    assert look(known, 100.0, (7, 1, 1, State.ANON)).settled == 0
    assert look(known, 100.0 + SETTLE / 2, (7, 1, 1, State.ANON)).settled == 0
    assert flags(known) == {7: 0}
    assert look(known, 100.0 + 1.5 * SETTLE, (7, 1, 1, State.ANON)).settled == 1
    assert flags(known) == {7: SETTLED}


def test_a_settled_page_is_told_once_and_stays_settled() -> None:
    known = regions(1)
    seen = [look(known, now, (7, 1, 1, State.ANON)).settled for now in (100, 110, 111, 140)]
    assert seen == [0, 1, 0, 0]
    assert flags(known) == {7: SETTLED}


def test_a_changed_page_starts_over() -> None:
    known = regions(1)
    look(known, 100.0, (7, 1, 1, State.ANON), (8, 5, 1, State.ANON))
    look(known, 110.0, (7, 1, 1, State.ANON), (8, 5, 1, State.ANON))
    look(known, 120.0, (7, 2, 1, State.ANON), (8, 5, 1, State.ANON))
    assert flags(known) == {7: 0, 8: SETTLED}
    look(known, 130.0, (7, 2, 1, State.ANON), (8, 5, 1, State.ANON))
    assert flags(known) == {7: SETTLED, 8: SETTLED}


@pytest.mark.parametrize(
    "state", [state for state in State if state not in (State.ANON, State.MERGED)]
)
def test_only_ordinary_and_merged_pages_are_remembered(state: State) -> None:
    known = regions(1)
    look(known, 100.0, (7, 1, 1, state))
    assert known.pages == 0


def test_zero_and_huge_pages_are_counted_apart() -> None:
    known = regions(1)
    seen = look(
        known, 100.0, (1, 0, 1, State.ZERO), (2, 9, 1, State.HUGE), (3, 9, 1, State.HUGE),
        (4, 9, 1, State.ANON), (5, 0, 0, State.SWAPPED),
    )  # fmt: skip
    assert (seen.zero, seen.huge, seen.scanned, seen.checksummed) == (1, 2, 5, 3)
    assert known.rows["zero"].tolist() == [1]
    assert known.rows["huge"].tolist() == [2]


def test_merged_pages_tell_what_they_save() -> None:
    known = regions(1)
    look(known, 100.0, (1, 3, 4, State.MERGED), (2, 4, 2, State.MERGED), (3, 5, 1, State.MERGED))
    assert known.rows["merged"].tolist() == [3]
    assert known.rows["saved_bytes"].tolist() == [4096 * 3 / 4 + 4096 / 2 + 0]
    assert flags(known)[1] & MERGED


def test_a_frame_with_all_the_mappings_it_may_have_is_full() -> None:
    known = regions(1)
    look(known, 100.0, (1, 3, 99, State.MERGED), (2, 4, 100, State.MERGED))
    assert flags(known) == {1: MERGED, 2: MERGED | FULL}


def test_map_counts_are_kept_up_to_many() -> None:
    known = regions(1)
    look(known, 1.0, (0, 1, 0, State.ANON), (1, 1, 254, State.ANON), (2, 1, 70000, State.ANON))
    words = np.frombuffer(known.words[0], dtype=np.uint64)
    assert map_count_of(words).tolist() == [1, 254, 255]


def test_several_regions_in_one_look() -> None:
    known = regions(4, 5, 6)
    seen = records((3, 1, 1, State.ANON), (512 + 511, 2, 1, State.ANON), count=2)
    known.look(1, 2, seen, 100.0, SETTLE, 100)
    assert [len(words) // 8 for words in known.words] == [0, 1, 1]
    assert known.rows["looks"].tolist() == [0, 1, 1]
    known.look(1, 2, seen, 110.0, SETTLE, 100)
    assert flags(known, 1) == {3: SETTLED}
    assert flags(known, 2) == {511: SETTLED}


def test_replace_keeps_what_stays() -> None:
    known = regions(4, 5)
    known.look(1, 1, records((3, 1, 1, State.ANON)), 100.0, SETTLE, 100)
    assert known.replace(np.array([2, 5, 9], dtype=np.uint64))
    assert [len(words) for words in known.words] == [0, 8, 0]
    assert known.rows["looks"].tolist() == [0, 1, 0]
    assert not known.replace(np.array([2, 5, 9], dtype=np.uint64))
    assert known.find(5) == 1
    assert known.find(4) is None


def test_mark_and_a_region_that_is_gone() -> None:
    known = regions(1)
    look(known, 100.0, (7, 1, 1, State.ANON), (8, 1, 1, State.ANON))
    known.mark(1, np.array([8, 9]), MERGED | SETTLED, 0)
    assert flags(known) == {7: 0, 8: MERGED | SETTLED}
    known.mark(1, np.array([8]), 0, SETTLED)
    assert flags(known) == {7: 0, 8: MERGED}
    known.mark(2, np.array([8]), SETTLED, 0)


def intervals(known: Regions, contents: list[int]) -> list[float]:
    """Scan a region whenever it is due, with one page of these contents; return the intervals."""
    found = []
    now = 100.0
    for content in contents:
        look(known, now, (7, content, 1, State.ANON))
        found.append(float(known.rows["interval"][0]))
        now = float(known.rows["due"][0])
    return found


def test_calm_regions_are_revisited_ever_more_rarely() -> None:
    found = intervals(regions(1), [1] * 12)
    assert found[:4] == [SETTLE, 2 * SETTLE, 4 * SETTLE, 8 * SETTLE]
    assert found[-1] == MAX_INTERVAL_SECONDS


def test_restless_regions_too() -> None:
    assert intervals(regions(1), [1, 2, 3, 4]) == [SETTLE, 2 * SETTLE, 4 * SETTLE, 8 * SETTLE]


def test_a_change_after_calm_is_soon_confirmed() -> None:
    found = intervals(regions(1), [1, 1, 1, 2, 2, 2])
    assert found == [SETTLE, 2 * SETTLE, 4 * SETTLE, SETTLE, 2 * SETTLE, 4 * SETTLE]


def test_a_merge_ends_the_back_off() -> None:
    known = regions(1)
    intervals(known, [1] * 8)
    known.revisit(1, 500.0, SETTLE)
    assert known.rows["due"].tolist() == [500.0 + SETTLE]
    assert known.rows["interval"].tolist() == [SETTLE]


# --- huge pages and zeros ------------------------------------------------------------------------

ALL = Wanted(huge=True, zero=True)


def look_at(known: Regions, now: float, wanted: Wanted, *pages: tuple[int, State, int]) -> Look:
    """Look at pages given as (page, state, order); all have the same checksum."""
    seen = np.zeros(REGION_PAGES, dtype=RECORD)
    for page, state, order in pages:
        seen[page] = (5 << 30, 1, state, order)
    return known.look(0, 1, seen, now, SETTLE, 100, wanted)


KINDS = ((1, State.HUGE, 9), (2, State.ZERO, 9), (3, State.ZERO, 0), (4, State.ANON, 0))


@pytest.mark.parametrize(
    ("wanted", "remembered"),
    [
        (Wanted(), {4: 0}),
        (Wanted(huge=True), {1: HUGE, 4: 0}),
        (Wanted(zero=True), {3: ZERO, 4: 0}),
        (ALL, {1: HUGE, 2: HUGE | ZERO, 3: ZERO, 4: 0}),
    ],
)
def test_only_what_is_wanted_is_remembered(wanted: Wanted, remembered: dict[int, int]) -> None:
    known = regions(1)
    look_at(known, 100.0, wanted, *KINDS)
    assert flags(known) == remembered
    # Whether wanted or not, it is counted.
    assert (known.rows["zero"][0], known.rows["huge"][0], known.rows["order"][0]) == (2, 2, 9)


def test_zeros_settle_apart_from_others() -> None:
    known = regions(1)
    look_at(known, 100.0, ALL, *KINDS)
    seen = look_at(known, 110.0, ALL, *KINDS)
    # A zero page in a huge page has to wait for the huge page to be split.
    assert (seen.settled, seen.settled_zero) == (3, 1)
    assert look_at(known, 120.0, ALL, *KINDS).settled == 0


def test_what_a_split_has_left_behind_is_worth_a_search() -> None:
    known = regions(1)
    for now in (100.0, 110.0):
        look_at(known, now, ALL, (1, State.HUGE, 9), (2, State.ZERO, 9))
    seen = look_at(known, 120.0, ALL, (1, State.ANON, 0), (2, State.ZERO, 0))
    assert (seen.settled, seen.settled_zero) == (1, 1)
    assert known.rows["order"][0] == 0


def test_the_largest_folio_gives_the_order() -> None:
    known = regions(1)
    look_at(known, 100.0, ALL, (0, State.HUGE, 4), (16, State.ZERO, 6), (80, State.ANON, 0))
    assert known.rows["order"][0] == 6


def test_merges_show_before_the_next_look() -> None:
    known = regions(1)
    known.merged(1, 3, 8192.0)
    known.merged(2, 3, 8192.0)  # gone meanwhile
    assert (known.rows["merged"][0], known.rows["saved_bytes"][0]) == (3, 8192.0)
    look_at(known, 100.0, ALL)
    assert (known.rows["merged"][0], known.rows["saved_bytes"][0]) == (0, 0)
