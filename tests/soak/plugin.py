# SPDX-License-Identifier: MIT
"""pytest within the soak: the important tests first, none after the deadline, all in the journal.

Set by `inside.py`: MERGEMEM_SOAK_JOURNAL, MERGEMEM_SOAK_ROUND, MERGEMEM_SOAK_SECONDS.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from tests.soak.journal import Journal

# Where a wrong page, a leak or a lock would most likely show comes first; what is about words of
# a message, or about the agent, comes last. Files that are not named here come in between.
FIRST = (
    *("concurren", "race", "writers", "lifetimes", "in_use", "after_merge"),
    *("test_merge", "swap", "zero", "huge", "notifier", "unmerge"),
)
# Failing allocations one by one takes minutes a test.
LAST = ("refusals", "results", "callers", "fuzz", "agent", "injection")
LONGEST_TEXT = 4000


def rank(path: str) -> int:
    """The place of a test file in the order of things."""
    for place, word in enumerate(FIRST):
        if word in path:
            return place
    for place, word in enumerate(LAST):
        if word in path:
            return len(FIRST) + 1 + place
    return len(FIRST)


class Soak:
    """One session: a round of the suite, or what is left of it."""

    def __init__(self, journal: Journal, number: int, seconds: float) -> None:
        self.journal = journal
        self.number = number
        self.deadline = time.monotonic() + seconds
        self.assertions = 0
        self.outcome = "passed"
        self.seconds = 0.0
        self.text = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        # Once begun it is not begun again: it has ended, or it ended the guest.
        begun = {e["id"] for e in self.journal.of("begin") if e["round"] == self.number}
        items.sort(key=lambda item: rank(Path(item.path).name))
        self.journal.write("collected", round=self.number, tests=[x.nodeid for x in items])
        config.hook.pytest_deselected(items=[x for x in items if x.nodeid in begun])
        items[:] = [item for item in items if item.nodeid not in begun]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> object | None:
        if time.monotonic() > self.deadline:
            return True  # as if it had been run; nothing in the journal says that it was
        self.assertions, self.seconds, self.outcome, self.text = 0, 0.0, "passed", ""
        self.journal.write("begin", id=item.nodeid, round=self.number)
        return None

    def pytest_assertion_pass(self) -> None:
        self.assertions += 1

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        if report.skipped:
            self.outcome = "skipped"
            reason = report.longrepr
            self.text = reason[2] if isinstance(reason, tuple) else str(reason)
            self.text = re.sub(r"^Skipped: ", "", self.text)
        elif report.failed:
            self.outcome = "failed"
            self.text += f"({report.when}) {report.longreprtext[-LONGEST_TEXT:]}\n"
        if report.when == "teardown":
            self.journal.write(
                "test",
                id=report.nodeid,
                round=self.number,
                outcome=self.outcome,
                seconds=round(self.seconds, 2),
                assertions=self.assertions,
                text=self.text,
            )


def pytest_configure(config: pytest.Config) -> None:
    """Nothing happens without the soak's settings."""
    path = os.environ.get("MERGEMEM_SOAK_JOURNAL")
    if path:
        number = int(os.environ["MERGEMEM_SOAK_ROUND"])
        seconds = float(os.environ["MERGEMEM_SOAK_SECONDS"])
        config.pluginmanager.register(Soak(Journal(Path(path)), number, seconds), "soak")
