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
    clocks.work(0.5)
    assert budget.charge("greedy") == pytest.approx(0.5)
    assert budget.policy_wait_seconds("greedy") > 40
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
