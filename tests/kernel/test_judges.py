# SPDX-License-Identifier: MIT
"""A few of the outside judges, briefly; `make judges` runs all of them, for longer."""

from __future__ import annotations

import pytest

from tests.judges import catalogue, judge
from tests.judges.merger import Settings
from tests.kernel.module import Module

SHORT_SECONDS = 10


@pytest.mark.parametrize("name", ["stress-vm", "stress-fork", "sqlite"])
def test_judge(module: Module, name: str) -> None:
    """It finds nothing wrong, though many of its pages are merged while it runs."""
    (chosen,) = (each for each in catalogue.JUDGES if each.name == name)
    settings = Settings(seed=judge.environment_seed())
    finding = judge.run(chosen, settings, SHORT_SECONDS)
    assert finding.verdict == "right", f"{settings}: {finding.as_dict()}"


def test_judge_finds_planted_fault(module: Module) -> None:
    """With bytes flipped in merged pages, a judge does not pass."""
    (chosen,) = (each for each in catalogue.JUDGES if each.name == "stress-vm")
    finding = judge.run(chosen, Settings(plant=True), SHORT_SECONDS)
    assert finding.account.numbers["planted"]
    assert finding.verdict == "wrong", finding.as_dict()
