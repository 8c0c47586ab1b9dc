# SPDX-License-Identifier: MIT
"""What results change, by themselves: counts, flags, figures, and when a region is looked at."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from mergemem_agent import outcome
from mergemem_agent.contract import GROUP_ZERO, RECORD, Result, State
from mergemem_agent.counts import Counts
from mergemem_agent.look import Wanted
from mergemem_agent.merge import Request, request_for
from mergemem_agent.nominated import NOMINATED
from mergemem_agent.policy import Policy, Selector
from mergemem_agent.procfs import ProcessId
from mergemem_agent.region import REGION_PAGES, Regions
from mergemem_agent.schedule import MAX_TICK_SECONDS, REVISIT
from mergemem_agent.targets import Target
from mergemem_agent.window import Stretch, Window
from mergemem_agent.word import DEEP, FLAGS, FULL, HUGE, MERGED, PARTNER, SETTLED, ZERO, page_of

NUMBER = 7  # of the one region that each process has
POLICY = Policy("web", Selector())


def target(pid: int, huge: Sequence[int] = (), zero: Sequence[int] = ()) -> Target:
    """Return a process whose eight pages have settled."""
    regions = Regions()
    regions.replace(np.array([NUMBER], dtype=np.uint64))
    records = np.zeros(REGION_PAGES, dtype=RECORD)
    for page in range(8):
        state = State.ZERO if page in zero else State.HUGE if page in huge else State.ANON
        records[page] = ((page + 1) << 40, 1, state, 9 if page in huge else 0)
    for now in (100.0, 110.0):
        Window([Stretch(regions, 0, 1)]).look(
            records, now, 10.0, 4096, Wanted(huge=True, zero=True)
        )
    return Target(ProcessId(pid, 1), POLICY, "domain", 0, regions)


def flags(of: Target) -> dict[int, int]:
    words = np.frombuffer(of.regions.words[0], dtype=np.uint64)
    return dict(
        zip(page_of(words).tolist(), (words & np.uint64(FLAGS & ~DEEP)).tolist(), strict=True)
    )


def request(*pages: tuple[int, int, bool, int, int], split_percent: int | None = None) -> Request:
    """Return a request for (process, page, anchor, group, order) pages."""
    rows = [
        (who, page, anchor, 1, NUMBER, group, order) for who, page, anchor, group, order in pages
    ]
    return request_for([np.array(rows, dtype=NOMINATED)], split_percent)


def results(*codes: Result) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.array(codes, dtype=np.uint8)


def test_each_result_leaves_its_mark() -> None:
    targets = [target(1), target(2)]
    asked = request(
        (0, 0, True, 0, 0), (1, 0, False, 0, 0), (0, 1, False, 1, 0), (1, 1, False, 1, 0),
        (0, 2, True, 2, 0), (1, 2, False, 2, 0),
    )  # fmt: skip
    outcome.remember(
        targets,
        asked,
        results(
            Result.ALREADYSH, Result.SUCCESS, Result.NODE, Result.BUSY,
            Result.ALREADYSH, Result.MOREMAP,
        ),
    )  # fmt: skip
    assert {page: flags(targets[0])[page] for page in range(4)} == {
        0: MERGED | SETTLED, 1: PARTNER, 2: MERGED | SETTLED | FULL, 3: SETTLED,
    }  # fmt: skip
    assert {page: flags(targets[1])[page] for page in range(4)} == {
        0: MERGED | SETTLED, 1: PARTNER, 2: SETTLED, 3: SETTLED,
    }  # fmt: skip


def test_figures_have_what_was_merged_at_once() -> None:
    targets = [target(1), target(2)]
    asked = request(
        (0, 0, False, 0, 0), (1, 0, False, 0, 0), (0, 1, False, 1, 0), (1, 1, False, 1, 0)
    )
    outcome.remember(
        targets, asked, results(Result.SUCCESS, Result.SUCCESS, Result.ALONE, Result.NOTEQUAL)
    )
    for each in targets:
        row = each.regions.rows[0]
        assert (row["merged"], row["saved_bytes"]) == (1, 2048.0)
        longest = REVISIT * POLICY.settle_seconds + MAX_TICK_SECONDS
        assert row["due"] <= time.monotonic() + longest


def test_a_merge_ends_the_back_off() -> None:
    targets = [target(1), target(2)]
    for each in targets:
        rows = each.regions.rows
        rows["interval"], rows["sample"], rows["due"] = 1000.0, 1e9, 1e9
    asked = request((0, 0, False, 0, 0), (1, 0, False, 0, 0))
    outcome.remember(targets, asked, results(Result.SUCCESS, Result.NOTEQUAL))
    again = REVISIT * POLICY.settle_seconds
    assert [each.regions.rows["interval"][0] for each in targets] == [again, 1000.0]
    assert targets[0].regions.rows["due"][0] < time.monotonic() + again + 10
    assert targets[1].regions.rows["due"][0] == 1e9


def test_regions_that_are_gone_are_left_out() -> None:
    targets = [target(1), target(2)]
    targets[0].regions.replace(np.array([NUMBER + 1], dtype=np.uint64))
    targets[1].regions.replace(np.zeros(0, dtype=np.uint64))
    asked = request((0, 0, False, 0, 0), (1, 0, False, 0, 0))
    outcome.remember(targets, asked, results(Result.SUCCESS, Result.SUCCESS))
    assert targets[0].regions.pages == targets[1].regions.pages == 0


def test_an_anchor_that_nobody_is_equal_to_is_read_again() -> None:
    targets = [target(1), target(2)]
    asked = request(
        (0, 0, True, 0, 0), (1, 0, False, 0, 0), (0, 1, True, 1, 0), (1, 1, False, 1, 0)
    )
    got = results(Result.ALREADYSH, Result.NOTEQUAL, Result.ALREADYSH, Result.SUCCESS)
    outcome.remember(targets, asked, got)
    assert flags(targets[0])[0] == MERGED | PARTNER
    assert flags(targets[0])[1] == MERGED | SETTLED


def test_a_split_huge_page_is_small_and_is_remembered() -> None:
    targets = [target(1, huge=[0, 1], zero=[1]), target(2, huge=[0])]
    asked = request(
        (0, 0, False, 0, 9), (1, 0, False, 0, 9), (0, 1, False, GROUP_ZERO, 9), split_percent=25
    )
    got = results(Result.SUCCESS, Result.SUCCESS, Result.ZEROED)
    outcome.remember(targets, asked, got)
    assert flags(targets[0])[0] == flags(targets[1])[0] == MERGED | SETTLED
    assert flags(targets[0])[1] == HUGE | ZERO, "to be settled anew"
    assert all(each.regions.rows["split"][0] > 0 for each in targets)
    counts = Counts()
    outcome.count(counts, targets, asked, got)
    assert (counts.freed_pages, counts.split_freed_pages, counts.zero_freed_pages) == (0, 1, 1)
    assert (counts.policies["web"].split_folios, counts.policies["web"].zeroed) == (2, 1)


def test_a_huge_page_that_stays_whole_has_cost_nothing() -> None:
    targets = [target(1, huge=[0]), target(2, huge=[0])]
    asked = request((0, 0, False, 0, 9), (1, 0, False, 0, 9), split_percent=25)
    got = results(Result.HUGE, Result.HUGE)
    outcome.remember(targets, asked, got)
    counts = Counts()
    outcome.count(counts, targets, asked, got)
    assert flags(targets[0])[0] == HUGE | PARTNER
    assert targets[0].regions.rows["split"][0] == 0
    assert (counts.split_freed_pages, counts.policies["web"].split_folios) == (0, 0)
