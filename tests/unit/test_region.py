# SPDX-License-Identifier: MIT
"""What is remembered of a page between two looks, and when a region is looked at next."""

from typing import Any

import numpy as np
import pytest

from mergemem_agent.contract import RECORD, State
from mergemem_agent.look import Wanted
from mergemem_agent.region import REGION_PAGES, Regions
from mergemem_agent.schedule import MAX_INTERVAL_SECONDS, REVISIT
from mergemem_agent.window import DOUBT_SECONDS, Look, Stretch, Window
from mergemem_agent.word import (
    DEEP,
    FLAGS,
    FULL,
    HUGE,
    MERGED,
    PARTNER,
    SETTLED,
    ZERO,
    map_count_of,
    page_of,
)

SETTLE = 10.0
FIRST = REVISIT * SETTLE  # seconds from the first sample to the next


def records(*pages: tuple[int, int, int, State], count: int = 1) -> np.ndarray[Any, np.dtype[Any]]:
    """Return records of `count` regions from (page, checksum, map count, state)."""
    result = np.zeros(count * REGION_PAGES, dtype=RECORD)
    for page, checksum, map_count, state in pages:
        result[page] = (checksum << 40, map_count, state, 0)
    return result


def regions(*numbers: int) -> Regions:
    result = Regions()
    result.replace(np.array(numbers, dtype=np.uint64))
    return result


def look(known: Regions, now: float, *pages: tuple[int, int, int, State]) -> Look:
    return Window([Stretch(known, 0, 1)]).look(records(*pages), now, SETTLE, 100)


def flags(known: Regions, row: int = 0) -> dict[int, int]:
    """Return the flags of each page, but for DEEP: here all are read in full."""
    words = np.frombuffer(known.words[row], dtype=np.uint64)
    return dict(
        zip(page_of(words).tolist(), (words & np.uint64(FLAGS & ~DEEP)).tolist(), strict=True)
    )


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
    Window([Stretch(known, 1, 2)]).look(seen, 100.0, SETTLE, 100)
    assert [len(words) // 8 for words in known.words] == [0, 1, 1]
    assert known.rows["looks"].tolist() == [0, 1, 1]
    Window([Stretch(known, 1, 2)]).look(seen, 110.0, SETTLE, 100)
    assert flags(known, 1) == {3: SETTLED}
    assert flags(known, 2) == {511: SETTLED}


def test_replace_keeps_what_stays() -> None:
    known = regions(4, 5)
    Window([Stretch(known, 1, 1)]).look(records((3, 1, 1, State.ANON)), 100.0, SETTLE, 100)
    assert known.replace(np.array([2, 5, 9], dtype=np.uint64))
    assert [len(words) for words in known.words] == [0, 8, 0]
    assert known.rows["looks"].tolist() == [0, 1, 0]
    assert not known.replace(np.array([2, 5, 9], dtype=np.uint64))
    assert known.find(5) == 1
    assert known.find(4) is None


def test_mark_pages_that_are_known() -> None:
    known = regions(1)
    look(known, 100.0, (7, 1, 1, State.ANON), (8, 1, 1, State.ANON))
    known.mark(0, np.array([8, 9]), MERGED | SETTLED, 0)
    assert flags(known) == {7: 0, 8: MERGED | SETTLED}
    known.mark(0, np.array([8]), 0, SETTLED)
    assert flags(known) == {7: 0, 8: MERGED}


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
    assert found[:4] == [FIRST, 2 * FIRST, 4 * FIRST, 8 * FIRST]
    assert found[-1] == MAX_INTERVAL_SECONDS


def test_restless_regions_too() -> None:
    assert intervals(regions(1), [1, 2, 3, 4]) == [FIRST, 2 * FIRST, 4 * FIRST, 8 * FIRST]


def test_a_change_after_calm_is_soon_looked_at() -> None:
    found = intervals(regions(1), [1, 1, 1, 2, 2, 2])
    assert found == [FIRST, 2 * FIRST, 4 * FIRST, FIRST, 2 * FIRST, 4 * FIRST]


# --- huge pages and zeros ------------------------------------------------------------------------

ALL = Wanted(huge=True, zero=True)


def look_at(known: Regions, now: float, wanted: Wanted, *pages: tuple[int, State, int]) -> Look:
    """Look at pages given as (page, state, order); all have the same checksum."""
    seen = np.zeros(REGION_PAGES, dtype=RECORD)
    for page, state, order in pages:
        seen[page] = (5 << 30, 1, state, order)
    return Window([Stretch(known, 0, 1)]).look(seen, now, SETTLE, 100, wanted)


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


# --- samples, full checksums, and pages that are not read ----------------------------------------

SAMPLED, IN_FULL, UNREAD = 0xFFFF_FFFF << 32, 0xFFFF_FFFF_FFFF_FFFF, 0
CONTENT = 0x1234_5678_9ABC_DEF0


def look_in_depth(
    known: Regions, now: float, *pages: tuple[int, int, int, State], sampled: bool = True
) -> Look:
    """Look at pages given as (page, checksum, what of it is told, state)."""
    seen = np.zeros(REGION_PAGES, dtype=RECORD)
    full = np.zeros(REGION_PAGES, dtype=np.bool_)
    for page, checksum, depth, state in pages:
        seen[page], full[page] = (checksum & depth, 2, state, 0), depth == IN_FULL
    return Window([Stretch(known, 0, 1)]).look(seen, now, SETTLE, 100, ALL, full, sampled)


def all_flags(known: Regions) -> dict[int, int]:
    words = known.words_of(0)
    return dict(zip(page_of(words).tolist(), (words & np.uint64(FLAGS)).tolist(), strict=True))


def settled(state: State = State.ANON) -> Regions:
    """Return a region whose page 7 was read in full twice."""
    known = regions(1)
    for now in (100.0, 110.0):
        look_in_depth(known, now, (7, CONTENT, IN_FULL, state))
    return known


def test_the_same_sample_leaves_what_is_known() -> None:
    known = settled()
    before = bytes(known.words[0])
    seen = look_in_depth(known, 120.0, (7, CONTENT, SAMPLED, State.ANON))
    assert bytes(known.words[0]) == before
    assert (seen.sampled, seen.checksummed, seen.fresh, seen.settled) == (1, 0, 0, 0)


@pytest.mark.parametrize("looks", [1, 2])
def test_a_page_that_stayed_alone_is_doubted_after_a_while(looks: int) -> None:
    """Whether it was dismissed or had settled: what changed beside its sample was not seen."""
    known = regions(1)
    for now in (100.0, 110.0)[:looks]:
        look_in_depth(known, now, (7, CONTENT, IN_FULL, State.ANON))
    known.rows["doubted"] = 100.0
    page = (7, CONTENT, SAMPLED, State.ANON)
    alone = DEEP | SETTLED if looks == 2 else DEEP
    for now, flags, fresh in (
        (100.0 + DOUBT_SECONDS - 1, alone, 0),
        (100.0 + DOUBT_SECONDS, 0, 1),  # as if it had only been sampled
        (101.0 + DOUBT_SECONDS, 0, 0),
    ):
        assert look_in_depth(known, now, page).fresh == fresh
        assert all_flags(known) == {7: flags}
    assert not look_in_depth(known, 100.0 + 3 * DOUBT_SECONDS).fresh, "gone, so nothing to search"


def test_a_page_with_a_partner_is_not_doubted() -> None:
    known = regions(1)
    look_in_depth(known, 100.0, (7, CONTENT, IN_FULL, State.ANON))
    known.partners(np.array([0]), np.array([7]), np.array([True]))
    look_in_depth(known, 100.0 + 2 * DOUBT_SECONDS, (7, CONTENT, SAMPLED, State.ANON))
    assert all_flags(known) == {7: DEEP | PARTNER}


def test_another_sample_is_another_page() -> None:
    known = settled()
    seen = look_in_depth(known, 120.0, (7, ~CONTENT, SAMPLED, State.ANON))
    assert all_flags(known) == {7: 0}
    assert seen.fresh == 1


def test_the_same_sample_of_another_page_is_found_out_in_full() -> None:
    known = settled()
    seen = look_in_depth(known, 120.0, (7, CONTENT ^ 0xFFFF_FFFF, IN_FULL, State.ANON))
    assert all_flags(known) == {7: DEEP}
    assert (seen.fresh, seen.deepened, seen.settled) == (0, 1, 0)


def test_a_page_that_is_not_read_is_as_it_was() -> None:
    known = settled()
    before = bytes(known.words[0])
    look_in_depth(known, 120.0, (7, CONTENT, UNREAD, State.ANON), sampled=False)
    assert bytes(known.words[0]) == before


def test_a_page_that_was_never_read_brings_samples_forward() -> None:
    known = settled()
    due = known.rows["sample"][0]
    look_in_depth(known, 120.0, (8, CONTENT, UNREAD, State.ANON), sampled=False)
    assert all_flags(known) == {}
    assert known.rows["sample"][0] == 120.0 + SETTLE < due


def test_merged_pages_are_read_only_where_nobody_knows_them() -> None:
    known = regions(1)
    look_in_depth(known, 100.0, (7, CONTENT, UNREAD, State.MERGED))
    assert all_flags(known) == {7: MERGED | PARTNER}
    assert Window([Stretch(known, 0, 1)]).wanted_in_full(101.0, SETTLE).nonzero()[0].tolist() == [7]
    seen = look_in_depth(known, 101.0, (7, CONTENT, IN_FULL, State.MERGED))
    assert all_flags(known) == {7: MERGED | DEEP}
    assert seen.fresh == 1
    before = bytes(known.words[0])
    look_in_depth(known, 102.0, (7, CONTENT, UNREAD, State.MERGED))
    assert bytes(known.words[0]) == before
    assert not Window([Stretch(known, 0, 1)]).wanted_in_full(103.0, SETTLE).any()


def test_a_merged_page_that_was_written_to_is_broken_whatever_it_looks_like() -> None:
    known = regions(1)
    look_in_depth(known, 100.0, (7, CONTENT, IN_FULL, State.MERGED))
    seen = look_in_depth(known, 200.0, (7, CONTENT, SAMPLED, State.ANON))
    assert (seen.broken, seen.fresh) == (1, 1)
    assert all_flags(known) == {7: 0}
    assert known.rows["restless"][0] == 1


def test_what_is_wanted_in_full_waits_for_settle_the_second_time() -> None:
    known = regions(1)
    look_in_depth(known, 100.0, (7, CONTENT, SAMPLED, State.ANON))
    known.partners(np.array([0]), np.array([7]), np.array([False]))
    known.schedule(100.0, SETTLE)
    assert known.next_due == 100.0
    assert Window([Stretch(known, 0, 1)]).wanted_in_full(100.0, SETTLE).nonzero()[0].tolist() == [7]
    look_in_depth(known, 101.0, (7, CONTENT, IN_FULL, State.ANON), sampled=False)
    assert not Window([Stretch(known, 0, 1)]).wanted_in_full(101.0, SETTLE).any()
    known.partners(np.array([0]), np.array([7]), np.array([True]))
    known.schedule(102.0, SETTLE)
    assert known.next_due == 101.0 + SETTLE
    assert not Window([Stretch(known, 0, 1)]).wanted_in_full(110.0, SETTLE).any()
    assert Window([Stretch(known, 0, 1)]).wanted_in_full(111.0, SETTLE).nonzero()[0].tolist() == [7]


def test_zeros_are_seen_twice_too() -> None:
    known = regions(1)
    look_in_depth(known, 100.0, (7, CONTENT, SAMPLED, State.ZERO))
    assert known.next_due == 110.0
    assert Window([Stretch(known, 0, 1)]).wanted_in_full(110.0, SETTLE).nonzero()[0].tolist() == [7]
    seen = look_in_depth(known, 110.0, (7, CONTENT, IN_FULL, State.ZERO), sampled=False)
    assert all_flags(known) == {7: ZERO | SETTLED}
    assert seen.settled_zero == 1


# --- regions in which much changes ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("pages", "moving", "longer"),
    [(200, 10, False), (200, 11, True), (20, 8, False), (20, 9, True)],
)
def test_where_many_pages_change_the_others_wait_longer(
    pages: int, moving: int, longer: bool
) -> None:
    """More than 5 %, and more than 8."""
    known = regions(1)

    def read(now: float, moving: int) -> Look:
        contents = [CONTENT + page * 2**40 for page in range(pages)]
        contents[:moving] = [2**50 * int(now)] * moving
        return look_in_depth(
            known, now, *((n, each, IN_FULL, State.ANON) for n, each in enumerate(contents))
        )

    read(100.0, 0)
    assert read(100.0 + SETTLE, moving).settled == (0 if longer else pages - moving)
    known.partners(np.array([0]), np.array([pages - 1]), np.array([True]))
    known.schedule(100.0 + SETTLE, SETTLE)
    assert known.next_due == 100.0 + SETTLE + (2 if longer else 1) * SETTLE
    assert read(100.0 + 3 * SETTLE, moving).settled == (pages - moving if longer else 0)
    assert known.rows["restless"].tolist() == [1 if longer else 0]
