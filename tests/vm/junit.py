# SPDX-License-Identifier: MIT
"""Counting tests from JUnit files, so that no figure is ever read out of printed text."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.vm.kernels import Skip


@dataclass(frozen=True)
class Counts:
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped
        )

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"

    @property
    def ran(self) -> int:
        return self.passed + self.failed


def read(path: Path) -> Counts:
    """The counts of one file; none when it is missing or was cut off while being written."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError):
        return Counts()
    total = Counts()
    for suite in root.iter("testsuite"):
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped = int(suite.get("skipped", 0))
        # A test that passes and then fails in its teardown is in `failures` or `errors` alone.
        total += Counts(max(0, int(suite.get("tests", 0)) - failed - skipped), failed, skipped)
    return total


def skips(path: Path) -> list[Skip]:
    """Which tests of a file were skipped, and why; an expected failure is no better."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError):
        return []
    found = []
    for case in root.iter("testcase"):
        for skipped in case.iter("skipped"):
            # A module that is skipped whole has no class name, and its own for a name.
            module = case.get("classname") or case.get("name") or "?"
            tests = f"{module.rsplit('.', 1)[-1]}.py::{case.get('name')}"
            kind = "expected to fail: " if skipped.get("type") == "pytest.xfail" else ""
            found.append(Skip(tests, kind + skipped.get("message", "")))
    return found


def write(path: Path, name: str, cases: Iterable[tuple[str, float, str | None]]) -> None:
    """A file for checks that are no pytest run: (name, seconds, what is wrong or None)."""
    cases = list(cases)
    failures = sum(problem is not None for _, _, problem in cases)
    suite = ElementTree.Element(
        "testsuite", name=name, tests=str(len(cases)), failures=str(failures)
    )
    for title, seconds, problem in cases:
        case = ElementTree.SubElement(
            suite, "testcase", classname=name, name=title, time=f"{seconds:.3f}"
        )
        if problem is not None:
            # XML has no place for the control characters that tools colour their output with.
            text = "".join(c for c in problem if c.isprintable() or c in "\n\t")
            failure = ElementTree.SubElement(case, "failure", message=text.splitlines()[0][:200])
            failure.text = text
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
