# SPDX-License-Identifier: MIT
"""What a person gets to see of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.judges.judge import Finding, Judge

COLUMNS = "{:<22} {:>6} {:>9} {:>9} {:>8} {:>7} {:>9} {:>6}  {}"
HEAD = COLUMNS.format(
    "judge", "s", "merged", "minimum", "zeroed", "splits", "unmerged", "wrong", "verdict"
)


def line(finding: Finding) -> str:
    """One judge."""
    account = finding.account
    return COLUMNS.format(
        finding.name,
        f"{finding.seconds:.0f}",
        account.merged,
        finding.minimum_merged,
        account.zeroed,
        account.numbers.get("split_folios", 0),
        account.numbers.get("unmerged_pages", 0),
        finding.wrong_results,
        finding.verdict,
    )


def total(findings: Sequence[Finding]) -> str:
    """The sum of all."""
    merged = sum(finding.account.merged for finding in findings)
    wrong = sum(finding.wrong_results for finding in findings)
    right = sum(finding.verdict == "right" for finding in findings)
    seconds = sum(finding.seconds for finding in findings)
    return (
        f"{len(findings)} judges in {seconds:.0f} s, {right} right; "
        f"{merged:,} pages merged, {wrong} wrong results"
    )


def listing(judges: Sequence[Judge]) -> str:
    """What there is."""
    return "\n".join(f"{judge.name:<22} {judge.seconds:>3} s  {judge.checks}" for judge in judges)


def markdown(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """For the documentation: the saved results of one kernel or of several."""
    found = {
        kernel: {judge["name"]: judge for judge in report["judges"]}
        for kernel, report in reports.items()
    }
    names = dict.fromkeys(name for judges in found.values() for name in judges)
    head, total = ["judge"], ["**all**"]
    for kernel, report in reports.items():
        head += [f"{kernel}: s", "merged", "zeroed", "wrong"]
        zeroed = sum(judge["zeroed"] for judge in report["judges"])
        total += _numbers(report["seconds"], report["merged"], zeroed, report["wrong_results"])
    rows = [
        [name, *(cell for judges in found.values() for cell in _cells(judges.get(name)))]
        for name in names
    ]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rows, total))


def _cells(judge: Mapping[str, Any] | None) -> list[str]:
    if judge is None:
        return [""] * 4
    told = ("seconds", "merged", "zeroed", "wrong_results")
    cells = _numbers(*(judge[name] for name in told))
    if judge["verdict"] != "right":
        cells[-1] += f" (**{judge['verdict']}**)"
    return cells


def _numbers(*numbers: float) -> list[str]:
    return [f"{number:,.0f}" for number in numbers]
