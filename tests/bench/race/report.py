# SPDX-License-Identifier: MIT
"""Puts what was measured now beside what was measured before, and writes all that people read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.bench import index_memory
from tests.bench.race import picture, table
from tests.bench.race.cases import CASES, Case
from tests.bench.race.figures import figures
from tests.bench.race.table import Report
from tests.vm.cache import CHECKOUT
from tests.vm.steps import say

DOCUMENT = CHECKOUT / "docs/benchmarks.md"
INDEX_PAGES = 2_000_000


def load(path: Path) -> Report:
    """The last report; nothing if there is none."""
    if not path.exists():
        return {}
    found: Report = json.loads(path.read_text(encoding="utf-8"))["kernels"]
    return found


def merge(report: Report, kernel: str, case: Case, facts: dict[str, Any]) -> None:
    """Take in what one guest wrote down, in the order of the cases."""
    measured = report.setdefault(kernel, {})
    measured[case.name] = figures(case, facts)
    ordered = {each.name: measured[each.name] for each in CASES if each.name in measured}
    report[kernel] = ordered


def save(report: Report, directory: Path, **more: float) -> Path:
    """report.json"""
    path = directory / "report.json"
    path.write_text(json.dumps(more | {"kernels": report}, indent=1) + "\n", encoding="utf-8")
    return path


def write(report: Report, directory: Path) -> None:
    """All that is read: report.json, the pictures, and the tables in the document."""
    index_bytes = index_memory.measure(INDEX_PAGES).peak_bytes_per_page
    path = save(report, directory, agent_peak_bytes_per_page=index_bytes)
    markdown = table.markdown(report, index_bytes)
    table.rewrite(DOCUMENT, markdown)
    say(f"\n{markdown}\nfigures  {path.relative_to(CHECKOUT)}")
    for kernel, cases in report.items():
        for drawn in picture.draw(kernel, cases, directory):
            say(f"picture  {drawn.relative_to(CHECKOUT)}")
