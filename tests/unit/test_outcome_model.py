# SPDX-License-Identifier: MIT
"""Results of whole requests against a plain model: one page after the other, one region at a time.

What outcome.py does for all pages together must be what its documentation says of each of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemem_agent import footprint, outcome
from mergemem_agent.contract import GROUP_ZERO, PAGE_BYTES, RECORD, Result, State
from mergemem_agent.counts import Counts
from mergemem_agent.merge import Request, request_for
from mergemem_agent.nominated import NOMINATED
from mergemem_agent.policy import Policy, Selector
from mergemem_agent.procfs import ProcessId
from mergemem_agent.region import REGION_PAGES, STAGES, Regions
from mergemem_agent.schedule import REVISIT
from mergemem_agent.targets import Target
from mergemem_agent.window import Stretch, Window
from mergemem_agent.word import (
    DEEP,
    FULL,
    HUGE,
    MERGED,
    PAGE_SHIFT,
    PARTNER,
    SETTLED,
    stage_of,
)

Array = np.ndarray[Any, np.dtype[Any]]
Place = tuple[int, int, int]  # process, number of the region, page

NUMBERS: Final = (3, 4, 2**35)
KINDS: Final = ("full", "sparse", "empty", "gone")
POLICIES: Final = [
    Policy(name, Selector(), settle_seconds=settle)
    for name, settle in (("a", 10.0), ("b", 25.0), ("c", 10.0))
]
PLACES: Final = st.tuples(
    st.sampled_from(range(len(POLICIES))),
    st.sampled_from(NUMBERS),
    st.sampled_from([0, 1, 2, 3, 64, 65, 509, 510, 511]),
)
LIKELY: Final = [Result.SUCCESS, Result.ALREADYSH, Result.NOTEQUAL, Result.MOREMAP]


@dataclass(frozen=True)
class Page:
    """One candidate, and what became of it."""

    group: int
    anchor: bool
    map_count: int
    order: int
    result: Result


def allowed(page: Page) -> bool:
    """Tell whether the kernel may say so: zeros are merged with nobody, and nobody's anchors."""
    zero = page.group == GROUP_ZERO
    return not (zero and (page.anchor or page.result == Result.SUCCESS))


PAGES: Final = st.dictionaries(
    PLACES,
    st.builds(
        Page,
        group=st.sampled_from([0, 1, 2, 3, GROUP_ZERO]),
        anchor=st.booleans(),
        map_count=st.sampled_from([1, 1, 2, 3]),
        order=st.sampled_from([0, 4, 9]),
        result=st.sampled_from(LIKELY) | st.sampled_from(Result),
    ).filter(allowed),
    min_size=1,
    max_size=40,
)


def target(process: int, kinds: list[str]) -> Target:
    """Return a process of whose regions all pages are known, every other one, none, or not it."""
    regions = Regions()
    known = [number for number, kind in zip(NUMBERS, kinds, strict=True) if kind != "gone"]
    regions.replace(np.array(known, dtype=np.uint64))
    for row, kind in enumerate(kind for kind in kinds if kind != "gone"):
        records = np.zeros(REGION_PAGES, dtype=RECORD)
        here = {"full": slice(None), "sparse": slice(0, None, 2), "empty": slice(0, 0)}[kind]
        records["checksum"][here] = (np.arange(REGION_PAGES, dtype=np.uint64) << np.uint64(33))[
            here
        ]
        records["state"][here], records["map_count"][here] = State.ANON, 1
        for now in (100.0, 110.0):
            Window([Stretch(regions, row, 1)]).look(records, now, 10.0, 4096)
        regions.mark(row, np.arange(0, REGION_PAGES, 3), HUGE, SETTLED)
    regions.rows["merged"], regions.rows["saved_bytes"] = 510, 1000.0
    regions.take_moves()
    return Target(ProcessId(process + 1, 1), POLICIES[process], "domain", 0, regions)


def request(pages: Mapping[Place, Page]) -> tuple[Request, list[Place]]:
    """Return a request for pages, and their order: anchors are first, zeros last."""
    order = sorted(pages, key=lambda place: (pages[place].group, not pages[place].anchor))
    rows = [
        (process, page, each.anchor, each.map_count, number, each.group, each.order)
        for (process, number, page), each in ((place, pages[place]) for place in order)
    ]
    return request_for([np.array(rows, dtype=NOMINATED)]), order


def words_of(targets: list[Target]) -> dict[Place, int]:
    words = {}
    for process, each in enumerate(targets):
        for row, number in enumerate(each.regions.rows["number"].tolist()):
            for word in each.regions.words_of(row).tolist():
                words[process, number, word >> PAGE_SHIFT & 511] = word
    return words


def expected_word(word: int, page: Page, pages: list[Page]) -> int:
    """Return what the result of one page makes of its word; `pages` are those of the request."""
    of_group = {each.result for each in pages if each.group == page.group}
    misled = Result.NOTEQUAL in of_group and Result.SUCCESS not in of_group
    if page.anchor and misled:
        return word & ~(SETTLED | DEEP) | MERGED | PARTNER
    if page.result in (Result.SUCCESS, Result.ALREADYSH):
        full = FULL if Result.MOREMAP in of_group else 0
        return word & ~HUGE | MERGED | SETTLED | full
    if page.result == Result.MOREMAP:
        return word
    return word & ~SETTLED | (0 if page.group == GROUP_ZERO else PARTNER)


def is_merged(page: Page) -> bool:
    return page.result == Result.SUCCESS and not page.anchor


def saved_bytes(page: Page, pages: list[Page]) -> float:
    """Return what a page saves, of whose frame there are as many mappings as the request tells."""
    group = [each for each in pages if each.group == page.group]
    mappings = sum(map(is_merged, group)) + sum(each.map_count for each in group if each.anchor)
    return PAGE_BYTES - PAGE_BYTES / mappings


def moves_of(before: dict[Place, int], after: dict[Place, int], process: int) -> Counter[Any]:
    stages = [
        tuple(stage_of(np.array([before[place], after[place]], dtype=np.uint64)).tolist())
        for place in before
        if place[0] == process
    ]
    return Counter(pair for pair in stages if pair[0] != pair[1])


@settings(max_examples=250)
@given(
    PAGES,
    st.lists(
        st.lists(st.sampled_from(KINDS), min_size=3, max_size=3),
        min_size=len(POLICIES),
        max_size=len(POLICIES),
    ),
    st.sampled_from([1, 2, 64]),
)
def test_what_is_remembered_is_what_the_model_says(
    pages: dict[Place, Page], kinds: list[list[str]], at_once: int
) -> None:
    targets = [target(process, kinds[process]) for process in range(len(POLICIES))]
    asked, order = request(pages)
    before, rows_before = words_of(targets), [each.regions.rows.copy() for each in targets]
    blobs = [list(map(id, each.regions.words)) for each in targets]
    usual = footprint._REGIONS_AT_ONCE
    footprint._REGIONS_AT_ONCE = at_once  # type: ignore[misc]
    try:
        outcome.remember(
            targets, asked, np.array([pages[place].result for place in order], dtype=np.uint8)
        )
    finally:
        footprint._REGIONS_AT_ONCE = usual  # type: ignore[misc]

    everybody = list(pages.values())
    after = words_of(targets)
    assert after == {
        place: expected_word(word, pages[place], everybody) if place in pages else word
        for place, word in before.items()
    }
    assert blobs == [list(map(id, each.regions.words)) for each in targets], "changed in place"
    for process, each in enumerate(targets):
        moves = each.regions.take_moves().reshape(STAGES, STAGES)
        np.fill_diagonal(moves, 0)
        found = {(a, b): int(moves[a, b]) for a in range(STAGES) for b in range(STAGES)}
        assert Counter(found) == moves_of(before, after, process)
        check_rows(each, rows_before[process], process, pages)


def check_rows(of: Target, before: Array, process: int, pages: dict[Place, Page]) -> None:
    everybody = list(pages.values())
    for row, old in zip(of.regions.rows, before, strict=True):
        here = [page for place, page in pages.items() if place[:2] == (process, int(row["number"]))]
        merged = [page for page in here if is_merged(page)]
        gained = [page for page in here if page.result in (Result.SUCCESS, Result.ZEROED)]
        assert row["merged"] == min(REGION_PAGES, old["merged"] + len(merged))
        saved = sum(saved_bytes(page, everybody) for page in merged)
        assert abs(row["saved_bytes"] - old["saved_bytes"] - saved) < 0.1
        assert (row["split"] > 0) == any(page.order == 9 for page in gained)
        if gained:
            assert row["interval"] == REVISIT * of.policy.settle_seconds
            assert row["sample"] > old["sample"]
        else:
            assert row["interval"] == old["interval"]
            assert (row["sample"], row["due"]) == (old["sample"], old["due"])


@settings(max_examples=250)
@given(PAGES)
def test_what_is_counted_is_what_the_model_says(pages: dict[Place, Page]) -> None:
    targets = [target(process, ["full"] * 3) for process in range(len(POLICIES))]
    asked, order = request(pages)
    counts = Counts()
    results = np.array([pages[place].result for place in order], dtype=np.uint8)
    outcome.count(counts, targets, asked, results)
    assert counts.results == Counter(page.result for page in pages.values())

    merged: defaultdict[tuple[int, int], int] = defaultdict(int)
    zeroed: Counter[int] = Counter()
    for page in pages.values():
        merged[page.group, page.map_count] += is_merged(page)
        zeroed[page.map_count] += page.result == Result.ZEROED
    anchored = {page.group for page in pages.values() if page.anchor}
    new = {group for (group, _), count in merged.items() if count} - anchored
    freed = sum(count // mappings for (_, mappings), count in merged.items())
    assert counts.freed_pages == freed - len(new)
    assert counts.zero_freed_pages == sum(count // m for m, count in zeroed.items())
    for process, policy in enumerate(POLICIES):
        of_policy = [page for place, page in pages.items() if place[0] == process]
        expected = sum(page.result == Result.ZEROED for page in of_policy)
        assert counts.policy(policy.name).zeroed == expected
