# SPDX-License-Identifier: MIT
"""What ``mergemem doctor`` finds, and how it is reported."""

import enum
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


class Severity(enum.Enum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One line of the report; `advice` is what to do, empty where nothing needs to be done."""

    severity: Severity
    subject: str
    text: str
    advice: str = ""


def report(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield the lines for people."""
    for finding in findings:
        text, *more = finding.text.splitlines()
        yield f"{finding.severity.value:<8} {finding.subject:<13} {text}"
        yield from (f"{'':22} {line}" for line in more)
        if finding.advice:
            yield f"{'':22} -> {finding.advice}"
    counts = Counter(finding.severity for finding in findings)
    yield ""
    yield ", ".join(f"{severity.value}: {counts[severity]}" for severity in Severity)


def as_json(finding: Finding) -> dict[str, str]:
    """Return a finding for json.dumps()."""
    return {
        "severity": finding.severity.value,
        "subject": finding.subject,
        "text": finding.text,
        "advice": finding.advice,
    }


def ok(subject: str, text: str) -> Finding:
    """All is well."""
    return Finding(Severity.OK, subject, text)


def note(subject: str, text: str, advice: str = "") -> Finding:
    """Worth knowing."""
    return Finding(Severity.NOTE, subject, text, advice)


def problem(subject: str, text: str, advice: str) -> Finding:
    """Keeps mergemem from working."""
    return Finding(Severity.PROBLEM, subject, text, advice)
