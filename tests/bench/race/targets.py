# SPDX-License-Identifier: MIT
"""What mergemem has promised to reach in the race, and whether it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.bench.race.cases import ADVISOR, DEFAULTS, FLAT_OUT, KSMD_HELD, MERGEMEM, MERGEMEM_HELD
from tests.bench.race.figures import Figures, middle

CPU_SHARE, CPU_SHARE_UNIQUE = 1 / 5, 1 / 10
TIME_SHARE = 1 / 3
BROKEN_SHARE = 0.05
IDLE_PERCENT = 0.5
METADATA_BYTES = 10.0
# A saving is counted in pages, of which each process has some of its own that come and go.
SAVING_SHARE = 0.999


@dataclass(frozen=True)
class Target:
    """A figure that is promised, where, how it is read, and what it may be."""

    name: str
    promise: str
    cases: tuple[str, ...]
    value: Callable[[Figures], float | None]
    reached: Callable[[float], bool]


@dataclass(frozen=True)
class Verdict:
    """One target in one case; no value: one of the two has not come so far."""

    target: Target
    value: float | None
    reached: bool


def ratio(
    key: str, ours: str = MERGEMEM, theirs: str = FLAT_OUT
) -> Callable[[Figures], float | None]:
    """Ours as a part of theirs."""

    def value(found: Figures) -> float | None:
        one, other = middle(found, ours, key), middle(found, theirs, key)
        return one / other if one is not None and other else None

    return value


def broken_share(found: Figures) -> float | None:
    return _broken(found, MERGEMEM)


def broken_against_ksm(found: Figures) -> float | None:
    """Against the KSM setting of which the smallest share broke, if it merged at all."""
    ours = _broken(found, MERGEMEM)
    theirs = [_broken(found, name) for name in (FLAT_OUT, DEFAULTS, ADVISOR)]
    least = min((share for share in theirs if share is not None), default=None)
    if ours is None or least is None:
        return None
    return ours / least if least else float("inf") if ours else 1.0


def _broken(found: Figures, name: str) -> float | None:
    breaks = found["contestants"].get(name, {}).get("breaks")
    return float(breaks["share"]) if breaks and breaks["merged"] else None


def _at_most(limit: float) -> Callable[[float], bool]:
    return lambda value: value <= limit


FIFTH_CASES = ("prefork", "weights", "duplicates", "growing")
TARGETS = (
    Target(
        "CPU per GiB saved, to 95 %, as a part of flat-out ksmd's",
        "at most 1/5",
        FIFTH_CASES,
        ratio("cpu_per_gib_to_95"),
        _at_most(CPU_SHARE),
    ),
    Target(
        "CPU per GiB saved, over the window, as a part of flat-out ksmd's",
        "at most 1/5",
        FIFTH_CASES,
        ratio("window_cpu_per_gib"),
        _at_most(CPU_SHARE),
    ),
    Target(
        "CPU per GiB saved, to 95 %, as a part of flat-out ksmd's",
        "at most 1/10",
        ("unique",),
        ratio("cpu_per_gib_to_95"),
        _at_most(CPU_SHARE_UNIQUE),
    ),
    Target(
        "CPU per GiB saved, over the window, as a part of flat-out ksmd's",
        "at most 1/10",
        ("unique",),
        ratio("window_cpu_per_gib"),
        _at_most(CPU_SHARE_UNIQUE),
    ),
    Target(
        "time to 95 %, both held to the same part of a core, as a part of ksmd's",
        "at most 1/3",
        ("prefork", "weights", "unique", "duplicates", "growing"),
        ratio("seconds_to_95", MERGEMEM_HELD, KSMD_HELD),
        _at_most(TIME_SHARE),
    ),
    Target(
        "merges broken within 60 s",
        f"under {BROKEN_SHARE:.0%}",
        ("churn",),
        broken_share,
        lambda value: value < BROKEN_SHARE,
    ),
    Target(
        "merges broken within 60 s, as a part of KSM's least",
        "under 1",
        ("churn",),
        broken_against_ksm,
        lambda value: value < 1,
    ),
    Target(
        "a core's percentage when idle",
        f"under {IDLE_PERCENT:g}",
        ("idle",),
        lambda found: middle(found, MERGEMEM, "idle_percent"),
        lambda value: value < IDLE_PERCENT,
    ),
    Target(
        "bytes saved at the end, as a part of flat-out ksmd's",
        "at least 1",
        ("prefork", "weights", "unique", "duplicates", "growing", "idle"),
        ratio("saved_bytes"),
        lambda value: value >= SAVING_SHARE,
    ),
)


def verdicts(case: str, found: Figures) -> list[Verdict]:
    """Of all targets that a case has."""
    chosen = [target for target in TARGETS if case in target.cases]
    values = [(target, target.value(found)) for target in chosen]
    return [
        Verdict(target, value, value is not None and target.reached(value))
        for target, value in values
    ]
