# SPDX-License-Identifier: MIT
"""One run's samples as a curve: which share of the census had come back when, for what CPU time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PAGE_BYTES = 4096
WANTED_SHARE = 0.95


@dataclass(frozen=True)
class Point:
    """One look. The clock starts when the last process has filled its memory."""

    seconds: float
    share: float
    saved_bytes: float
    cpu_seconds: float
    system_share: float  # of that CPU time; the rest is user time


def points(run: dict[str, Any], shared_by_fork: int, duplicates: int, ticks: int) -> list[Point]:
    """All looks of a run, those before the clock starts among them."""
    return [
        point(sample, sample["at"] - run["ready"], shared_by_fork, duplicates, ticks)
        for sample in run["samples"]
    ]


def point(
    sample: dict[str, float], seconds: float, shared_by_fork: int, duplicates: int, ticks: int
) -> Point:
    """A look's figures. Pages that fork shares are no saving of anybody's."""
    saved_pages = sample["mappings"] - sample["frames"] - shared_by_fork
    accounted = (sample["user_ticks"] + sample["system_ticks"]) / ticks
    return Point(
        seconds=seconds,
        share=saved_pages / max(1, duplicates),
        saved_bytes=saved_pages * PAGE_BYTES,
        cpu_seconds=sample["cpu_ns"] / 1e9,
        system_share=sample["system_ticks"] / ticks / accounted if accounted else 0.0,
    )


def reached(curve: Sequence[Point], share: float = WANTED_SHARE) -> Point | None:
    """The first look, from the start of the clock on, that found so much; None: there was none."""
    return next((one for one in curve if one.seconds >= 0 and one.share >= share), None)


def at(curve: Sequence[Point], seconds: float) -> Point:
    """The last look before that time, or the first of all."""
    before = [one for one in curve if one.seconds <= seconds]
    return before[-1] if before else curve[0]
