# SPDX-License-Identifier: MIT
"""The CPU budget, with clocks that tests turn by hand."""

import pytest

from mergemem_agent.budget import BURST_SECONDS, Budget


class Clocks:
    """A clock on the wall and a CPU clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.cpu_seconds = 5.0

    def budget(self, percent: float, **policies: float) -> Budget:
        return Budget(percent, policies, lambda: self.now, lambda: self.cpu_seconds)

    def work(self, cpu_seconds: float) -> None:
        self.now += cpu_seconds
        self.cpu_seconds += cpu_seconds


def run(clocks: Clocks, budget: Budget, seconds: float, slice_seconds: float) -> float:
    """Work whenever the budget lets us, for so long; return the CPU time taken."""
    start, before = clocks.now, clocks.cpu_seconds
    while clocks.now < start + seconds:
        clocks.now += budget.wait_seconds()
        clocks.work(slice_seconds)
        budget.charge()
    return clocks.cpu_seconds - before


@pytest.mark.parametrize("percent", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("slice_seconds", [0.0005, 0.01, 0.2])
def test_the_budget_holds_and_is_used(percent: float, slice_seconds: float) -> None:
    clocks = Clocks()
    seconds = 600.0
    taken = run(clocks, clocks.budget(percent), seconds, slice_seconds)
    earned = percent / 100 * seconds
    assert taken <= earned + percent / 100 * BURST_SECONDS + 2 * slice_seconds
    assert taken >= 0.95 * earned - slice_seconds


def test_nothing_is_saved_up_beyond_a_burst() -> None:
    clocks = Clocks()
    budget = clocks.budget(5.0)
    clocks.now += 86400
    taken = run(clocks, budget, 10.0, 0.001)
    assert taken <= 0.05 * (10.0 + BURST_SECONDS) + 0.002


@pytest.mark.parametrize("percent", [0.5, 5.0, 50.0])
def test_no_ten_seconds_take_a_tenth_more(percent: float) -> None:
    """Whichever ten seconds one looks at, if no slice is dearer than half a second's earning."""
    clocks = Clocks()
    budget = clocks.budget(percent)
    slice_seconds = percent / 100 * 0.4
    taken = [(0.0, clocks.cpu_seconds)]
    start = clocks.now
    while clocks.now < start + 60:
        wait = budget.wait_seconds()
        # Now and then it has nothing to do, and saves up what it may.
        clocks.now += wait or (5.0 if len(taken) % 50 == 0 else 0.0)
        clocks.work(slice_seconds)
        budget.charge()
        taken.append((clocks.now, clocks.cpu_seconds))
    most = max(
        after - before
        for began, before in taken
        for ended, after in taken
        if began <= ended <= began + 10
    )
    assert most <= 1.1 * percent / 100 * 10


def test_another_percentage_holds_from_now_on() -> None:
    clocks = Clocks()
    budget = clocks.budget(5.0, shop=2.0)
    run(clocks, budget, 20.0, 0.001)
    budget.set_percent(20.0)
    assert budget.percent == 20
    assert run(clocks, budget, 100.0, 0.001) == pytest.approx(20.0, rel=0.02)
    budget.set_percent(1.0)
    assert run(clocks, budget, 100.0, 0.001) == pytest.approx(1.0, rel=0.05)


def test_policies_follow_in_proportion() -> None:
    clocks = Clocks()
    budget = clocks.budget(5.0, shop=2.0, large=50.0)
    budget.set_percent(20.0)
    clocks.now += 60
    for policy, percent in (("shop", 8.0), ("large", 100.0)):
        clocks.work(1.0)
        budget.charge(policy)
        overdrawn = 1.0 - percent / 100 * BURST_SECONDS
        assert budget.policy_wait_seconds(policy) >= overdrawn / (percent / 100)
        assert budget.policy_wait_seconds(policy) <= 1.0 / (percent / 100)


def test_a_whole_core_never_waits_long() -> None:
    clocks = Clocks()
    assert run(clocks, clocks.budget(100.0), 100.0, 0.01) == pytest.approx(100.0, rel=0.02)


def test_work_that_nobody_charged_is_paid_by_the_agent() -> None:
    clocks = Clocks()
    budget = clocks.budget(5.0)
    clocks.cpu_seconds += 1.0  # another thread: a scrape
    assert budget.wait_seconds() > 10.0


def test_a_policy_pays_for_itself_and_no_other() -> None:
    clocks = Clocks()
    budget = clocks.budget(50.0, greedy=1.0, modest=1.0)
    clocks.work(0.1)
    assert budget.charge("greedy") == pytest.approx(0.1)
    assert budget.policy_wait_seconds("greedy") > 9
    assert budget.policy_wait_seconds("modest") == 0
    assert budget.wait_seconds() == 0


def test_an_unknown_policy_is_bound_by_the_agents_budget_alone() -> None:
    clocks = Clocks()
    budget = clocks.budget(50.0)
    clocks.work(0.1)
    budget.charge("forgotten")
    assert budget.policy_wait_seconds("forgotten") == 0


def test_a_budget_of_nothing_waits_and_does_not_fail() -> None:
    clocks = Clocks()
    budget = clocks.budget(0.0)
    clocks.work(0.01)
    assert budget.wait_seconds() > 60


def test_a_slice_is_as_long_as_the_smaller_budget_allows() -> None:
    """Both accounts pay for it, and what it overdraws of either is slept off."""
    budget = Clocks().budget(50.0, small=2.0, large=90.0)
    assert budget.slice_seconds("small") == pytest.approx(0.02 * BURST_SECONDS * 0.4)
    for policy in ("large", "none of its own"):
        assert budget.slice_seconds(policy) == pytest.approx(0.5 * BURST_SECONDS * 0.4)
