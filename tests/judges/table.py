# SPDX-License-Identifier: MIT
"""What a person gets to see of a run."""

from __future__ import annotations

from collections.abc import Sequence

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
