# SPDX-License-Identifier: MIT
"""Which regions go first, what is expected of them, and when they come again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemem_agent import order, schedule
from mergemem_agent.hint import Hint
from mergemem_agent.order import OVERDUE_SECONDS, SLICE_REGIONS, Plan, Slice
from mergemem_agent.policy import Policy, Selector
from mergemem_agent.prior import Costs, Siblings, Success
from mergemem_agent.procfs import ProcessId
from mergemem_agent.region import REGION_PAGES, REGION_SHIFT, ROW, Regions
from mergemem_agent.schedule import NEGLECT_SECONDS
from mergemem_agent.targets import Target

Array = np.ndarray[Any, np.dtype[Any]]
POLICY = Policy("web", Selector())
NOW = 10_000.0


def target(pid: int, *numbers: int) -> Target:
    """Return a process of whose regions nothing is known."""
    regions = Regions()
    regions.replace(np.array(numbers, dtype=np.uint64))
    return Target(ProcessId(pid, 1), POLICY, "domain", 0, regions)


def known(of: Target, **fields: object) -> None:
    """Make all of its regions ones that were looked at, and are due."""
    rows = of.regions.rows
    rows["looks"], rows["pages"], rows["sample"], rows["due"] = 1, REGION_PAGES, NOW - 1, NOW - 1
    for name, value in fields.items():
        rows[name] = value


def merged_well(*numbers: int) -> Siblings:
    """Return what is known after regions with these numbers have merged, and all others not."""
    siblings = Siblings()
    everything = np.arange(1, 200, dtype=np.uint64)
    pages = np.full(len(everything), REGION_PAGES)
    siblings.learn(everything, pages, np.where(np.isin(everything, numbers), REGION_PAGES, 0))
    return siblings


def take(plan: Plan) -> Slice | None:
    work = plan.peek()
    plan.skip()
    return work


def order_of(targets: list[Target], siblings: Siblings, costs: Costs | None = None) -> list[Any]:
    """Return (pid, number) of all slices, in order."""
    plan = Plan(targets, [siblings] * len(targets), Success(), costs or Costs(), NOW)
    slices = []
    while len(plan):
        work = take(plan)
        assert work is not None
        number = int(work.target.regions.rows["number"][work.first])
        slices.append((work.target.process.pid, number))
    return slices


def test_new_regions_whose_siblings_merged_well_go_first() -> None:
    targets = [target(1, 100, 110, 120), target(2, 101)]
    assert order_of(targets, merged_well(120))[0] == (1, 120)
    assert order_of(targets, merged_well(101))[0] == (2, 101)


def test_partners_go_before_new_memory_and_that_before_known() -> None:
    partners, new, old = target(1, 100), target(2, 100), target(3, 100)
    known(partners, sample=NOW + 100, second=400)
    known(old, news=0.0)
    assert order_of([old, new, partners], Siblings()) == [(1, 100), (2, 100), (3, 100)]


def test_regions_in_which_much_was_new_go_before_calm_ones() -> None:
    calm, restless = target(1, 100), target(2, 100)
    known(calm, news=1.0)
    known(restless, news=300.0)
    assert order_of([calm, restless], Siblings()) == [(2, 100), (1, 100)]


def test_what_was_looked_at_only_once_is_looked_at_again() -> None:
    """The first look finds all of it new, however calm it is; the second one tells."""
    once, twice = target(1, 100), target(2, 100)
    for one, changes in (once, [512]), (twice, [512, 0]):
        for changed in changes:
            look(one.regions.rows, changed=changed)
        known(one, looks=len(changes))
    plan = Plan([once, twice], [Siblings()] * 2, Success(), Costs(), NOW)
    works = [take(plan) for _ in range(len(plan))]
    worth = {work.target.process.pid: work.worth for work in works if work}
    assert worth == {1: True, 2: False}


@pytest.mark.parametrize(
    ("changes", "news"), [([512, 100], 100), ([512, 100, 0], 50), ([512, 0, 100, 100], 75)]
)
def test_news_are_averaged_from_the_second_look_on(changes: list[int], news: float) -> None:
    one = target(1, 100)
    for changed in changes:
        look(one.regions.rows, changed=changed)
    assert one.regions.rows["news"][0] == news


@pytest.mark.parametrize(
    ("pages", "faults", "news"), [(0, 512, 512), (500, 100, -1), (5, 600, 512)]
)
def test_hints_tell_more_than_a_first_look_at_memory_that_was_not_there_yet(
    pages: int, faults: int, news: float
) -> None:
    one = target(1, 100)
    look(one.regions.rows, changed=pages)
    one.regions.rows["pages"] = pages
    one.regions.hint(0, NOW, 10.0, Hint(one.process, 100 << REGION_SHIFT, faults, 0))
    assert one.regions.rows["news"][0] == news


def test_what_is_not_worth_it_is_left_out_at_once() -> None:
    calm, lively, other = target(1, 100), target(2, 100), target(3, 100)
    known(calm, news=0.0)
    for one in (lively, other):
        known(one, news=100.0)
    plan = Plan([calm, lively, other], [Siblings()] * 3, Success(), Costs(), NOW)
    assert take(plan)
    assert plan.drop_unworthy()
    assert len(plan) == 1
    work = take(plan)
    assert work
    assert work.worth
    assert not plan.drop_unworthy()


# One region, of which samples were taken.
EVERYWHERE = np.ones(1, dtype=np.bool_)


def look(rows: Array, changed: int, broken: int = 0, merged_before: int = 0) -> None:
    """Take in one look at samples of a region's pages."""
    pages = np.array([[changed], [broken], [merged_before]])
    schedule.after_look(rows, pages[0], pages[1], pages[2], NOW, 10.0, EVERYWHERE)


def test_only_what_promises_enough_is_read_in_full_at_once() -> None:
    costs = Costs()
    assert 0.5 <= costs.straight_share < 1
    targets = [target(1, 100, 150)]
    plan = Plan(targets, [merged_well(100)], Success(), costs, NOW)
    assert [work.straight for work in (take(plan), take(plan)) if work] == [True, False]


def test_slices_are_neighbours_of_one_kind() -> None:
    numbers = [*range(100, 100 + SLICE_REGIONS + 3), 300, 302]
    one = target(1, *numbers)
    known(one)
    one.regions.rows["sample"][2] = NOW + 5  # there, only partners are due
    plan = Plan([one], [Siblings()], Success(), Costs(), NOW)
    works = [take(plan) for _ in range(len(plan))]
    shapes = sorted((work.first, work.count, work.sampled) for work in works if work)
    assert shapes == [
        (0, 2, True), (2, 1, False), (3, SLICE_REGIONS, True), (19, 1, True), (20, 1, True),
    ]  # fmt: skip


def test_what_has_gone_meanwhile_is_left_out() -> None:
    one = target(1, 100, 101)
    plan = Plan([one], [Siblings()], Success(), Costs(), NOW)
    one.regions.replace(np.array([101], dtype=np.uint64))
    assert take(plan) is None


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.floats(0.1, 9e3)), min_size=1, max_size=200),
)
def test_none_starves(waiting: list[tuple[float, float]]) -> None:
    """Whatever the scores: the n-th of those that are overdue comes n * 5th at the latest."""
    scores = np.array([score for score, _ in waiting])
    due = NOW - np.array([seconds for _, seconds in waiting])
    found = order._with_turns(scores, NOW - due)
    assert sorted(found.tolist()) == list(range(len(waiting)))
    overdue = [index for index in np.argsort(due, kind="stable") if NOW - due[index] > 60.0]
    place = {index: at for at, index in enumerate(found.tolist())}
    assert OVERDUE_SECONDS == 60.0
    for turn, index in enumerate(overdue):
        assert place[index] <= 5 * turn


def test_without_anybody_overdue_the_score_decides() -> None:
    scores = np.array([1.0, 3.0, 2.0])
    assert order._with_turns(scores, np.ones(3)).tolist() == [1, 2, 0]


def test_what_promises_next_to_nothing_is_not_worth_it_until_it_was_neglected() -> None:
    calm, lively, neglected = target(1, 100), target(2, 100), target(3, 100)
    for one in (calm, neglected):
        known(one, news=0.0)
    known(lively, news=100.0)
    neglected.regions.rows["due"] = NOW - NEGLECT_SECONDS - 1
    plan = Plan([calm, lively, neglected], [Siblings()] * 3, Success(), Costs(), NOW)
    works = [take(plan) for _ in range(len(plan))]
    worth = {work.target.process.pid: work.worth for work in works if work}
    assert worth == {1: False, 2: True, 3: True}


# --- what is measured ----------------------------------------------------------------------------


def test_costs_are_learnt_from_slices() -> None:
    """Slices of different make-up tell the parts apart."""
    costs, random = Costs(), np.random.default_rng(1)
    for _ in range(3000):
        regions = int(random.integers(1, 17))
        pages = regions * int(random.choice([2, 100, 512]))
        sampled, full = (pages, 0) if random.integers(2) else (0, pages)
        costs.learn(regions * 2e-4 + sampled * 3e-6 + full * 2e-5, regions, sampled, full)
    assert costs.region == pytest.approx(2e-4, rel=0.3)
    assert costs.sample == pytest.approx(3e-6, rel=0.3)
    assert costs.full == pytest.approx(2e-5, rel=0.3)


def test_siblings_forget() -> None:
    siblings = merged_well(100)
    number, pages = np.array([100], dtype=np.uint64), np.array([REGION_PAGES])
    assert siblings.share(number)[0] == 1
    for _ in range(10):
        siblings.learn(number, pages, np.array([0]))
    assert siblings.share(number)[0] < 0.1


def test_success_is_what_was_merged() -> None:
    success = Success()
    success.learn(100_000, 50_000, 10_000)
    assert success.of_first == pytest.approx(0.1, abs=0.02)
    assert success.of_second == pytest.approx(0.2, abs=0.02)


# --- breakage ------------------------------------------------------------------------------------


def after_looks(*broken: int) -> list[float]:
    """Look at a region of 100 merged pages, of which so many are broken each time.

    Returns how many times as long as others it has to settle, after each look.
    """
    rows = np.zeros(1, dtype=ROW)
    factors = []
    for pages in broken:
        look(rows, changed=pages, broken=pages, merged_before=100)
        factors.append(float(schedule.settle_of(rows, 10.0)[0]) / 10)
    return factors


def test_regions_whose_merges_break_back_off() -> None:
    assert after_looks(5, 6, 6, 6, 6, 6) == [1, 2, 4, 8, 16, 16]


def test_and_recover_slowly() -> None:
    assert after_looks(50, 50, 0, 0, 0, 0, 0, 0, 0, 0) == [2, 4, 4, 4, 4, 2, 2, 2, 2, 1]


def test_a_long_settle_puts_off_everything() -> None:
    rows = np.zeros(1, dtype=ROW)
    rows["restless"], rows["second"] = 2.0, 5
    rows["read"] = rows["sampled"] = NOW
    rows["sample"] = NOW + 1000
    schedule.after_search(rows, NOW, 10.0)
    assert rows["due"][0] == NOW + 40
    assert not schedule.apart(rows, NOW + 39, 10.0).any()
    assert schedule.apart(rows, NOW + 40, 10.0).all()


@given(st.floats(0.0, 60.0), st.floats(0.0, 1e8), st.lists(st.floats(0.0, 100.0), min_size=1))
def test_looks_wait_for_others_but_not_for_long(
    settle: float, now: float, after: list[float]
) -> None:
    rows = np.zeros(len(after), dtype=ROW)
    rows["sample"] = before = now + np.array(after)
    schedule.after_search(rows, now, settle)
    waits = rows["due"] - before
    assert waits.min() >= 0
    assert waits.max() <= min(settle / 4, 0.5)
    due = rows["due"].copy()
    schedule.after_search(rows, now, settle)
    assert rows["due"].tolist() == due.tolist(), "nothing is put off twice"


def test_second_looks_wait_for_others_too() -> None:
    rows = np.zeros(4, dtype=ROW)
    rows["second"], rows["sample"] = 5, NOW + 1000
    rows["read"] = NOW + np.array([0.1, 0.2, 0.3, 0.4])
    schedule.after_search(rows, NOW, 10.0)
    assert rows["due"].tolist() == [NOW + 10.5] * 4


def test_a_search_does_not_make_what_is_overdue_wait_anew() -> None:
    rows = np.zeros(3, dtype=ROW)
    rows["first"], rows["sample"] = 5, NOW + 1000
    rows["due"] = [NOW - 100, NOW + 100, 0.0]
    schedule.after_search(rows, NOW, 10.0)
    assert rows["due"].tolist() == [NOW - 100, NOW, NOW]


def test_looks_that_are_due_at_about_the_same_time_come_together() -> None:
    rows = np.zeros(4, dtype=ROW)
    rows["sample"] = NOW + np.array([0.1, 0.2, 0.3, 0.4])
    schedule.after_search(rows, NOW, 10.0)
    assert rows["due"].tolist() == [NOW + 0.5] * 4


def test_times_keep_their_precision() -> None:
    """A host that has been up for years: half a second is still half a second."""
    rows = np.zeros(1, dtype=ROW)
    now = 1e8 + 0.25
    zero = np.zeros(1, dtype=np.intp)
    schedule.after_look(rows, zero, zero, zero, now, 0.5, EVERYWHERE)
    assert rows["sample"][0] == now + 0.5 * schedule.REVISIT
    rows["read"] = now
    assert not schedule.apart(rows, now + 0.25, 0.5).any()
    assert schedule.apart(rows, now + 0.5, 0.5).all()
