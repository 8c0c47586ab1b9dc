# SPDX-License-Identifier: MIT
"""What a judge is, and how one is run under the merger."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.judges import family
from tests.judges.merger import Account, Merger, MergerFailed, Settings, shared_now
from tests.judges.place import NotRun, Place, Wrong

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Far more than the end of a judge's processes takes.
SETTLE_SECONDS = 60
DETAIL_CHARACTERS = 2000

Verdict = Literal["right", "wrong", "too few merges", "not run"]


@dataclass(frozen=True)
class Judge:
    """A program that checks its own results."""

    name: str
    # What its verdict rests on, for people.
    checks: str
    work: Callable[[Place], None]
    # It counts only if so many of its pages were merged, or made zero pages, while it ran.
    minimum_merged: int
    seconds: int = 15


@dataclass(frozen=True)
class Finding:
    """What came out of one judge."""

    name: str
    verdict: Verdict
    seconds: float
    minimum_merged: int
    wrong_results: int = 0
    detail: str = ""
    account: Account = field(default_factory=lambda: Account({}, {}, {}))

    def as_dict(self) -> dict[str, Any]:
        return {
            **{name: value for name, value in asdict(self).items() if name != "account"},
            "merged": self.account.merged,
            "zeroed": self.account.zeroed,
            "split_folios": self.account.numbers.get("split_folios", 0),
            "unmerged": self.account.numbers.get("unmerged_pages", 0),
            "merger": self.account.as_dict(),
        }


def run(judge: Judge, settings: Settings, seconds: int | None = None) -> Finding:
    """Run a judge under the merger, and see to it that nothing of either is left."""
    with family.adopted(), _place(judge, seconds or judge.seconds) as place:
        shared_before, _ = shared_now()
        verdict: Verdict = "right"
        detail, wrong, account = "", 0, Account({}, {}, {})
        with Merger(settings) as merger:
            try:
                judge.work(place)
            except Wrong as finding:
                verdict, detail, wrong = "wrong", str(finding), finding.count
            except NotRun as reason:
                verdict, detail = "not run", str(reason)
            try:
                account = merger.stop()
            except MergerFailed as failure:
                verdict, detail, wrong = "wrong", f"{detail}\nthe merger: {failure}", wrong + 1
            took_seconds = time.monotonic() - place.started
            family.end_all()
        if not shared_before and (left := _left_over()):
            wrong += 1
            verdict, detail = "wrong", f"{detail}\n{left} shared pages are left of it"
        minimum = 0 if settings.idle else judge.minimum_merged
        if verdict == "right" and account.replaced < minimum:
            verdict = "too few merges"
            detail = f"{account.replaced} pages merged or zeroed, at least {minimum} expected"
        return Finding(
            judge.name,
            verdict,
            took_seconds,
            minimum,
            wrong,
            detail.strip()[-DETAIL_CHARACTERS:],
            account,
        )


class _place:  # noqa: N801
    """A directory of its own, with huge pages as Debian has them."""

    def __init__(self, judge: Judge, seconds: int) -> None:
        self._name, self._seconds = judge.name, seconds

    def __enter__(self) -> Place:
        found = HUGE_PAGES.read_text(encoding="ascii") if HUGE_PAGES.exists() else "[]"
        self._huge_pages = found.partition("[")[2].partition("]")[0]
        self._set_huge_pages("always")
        self._directory = Path(tempfile.mkdtemp(prefix=f"judge-{self._name}-"))
        # The databases' user must reach it.
        self._directory.chmod(0o777)
        return Place(self._directory, self._seconds)

    def __exit__(self, *failure: object) -> None:
        family.end_all()
        self._set_huge_pages(self._huge_pages)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _set_huge_pages(self, choice: str) -> None:
        if self._huge_pages:
            HUGE_PAGES.write_text(choice, encoding="ascii")


def _left_over() -> int:
    """Shared pages that stay once all processes have gone."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (left := shared_now()[0]) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def environment_seed() -> int:
    """A seed for the merger that differs from run to run, and is told."""
    return int.from_bytes(os.urandom(4), "little")
