# SPDX-License-Identifier: MIT
"""From what a guest wrote down to what one merge costs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench import locks

# "  5.320 us  |  name();", or the end of a call that contains others: "  9.1 us  |  } /* name */".
_CALL = re.compile(r"([\d.]+) us\s+\|(\s+)(?:(\w[\w.]*)\(\);|} /\* (\w[\w.]*) \*/)")


@dataclass(frozen=True)
class Spread:
    """Several rounds of one figure."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


def figures(directory: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """All figures of one guest; nanoseconds are instructions where it counted those."""
    rounds = facts["rounds"]
    pages = rounds[0]["mergemem"]["pages"]

    def per_page(value: Callable[[dict[str, Any]], float]) -> dict[str, float]:
        return asdict(Spread.of([value(one) / pages for one in rounds]))

    checksums, flushes = facts["checksums"], facts["flushes"]
    full, sampled = (
        Spread.of([cpu_ns / checksums["pages"] for cpu_ns in checksums[name]])
        for name in ("full_ns", "sampled_ns")
    )
    return {
        "pages": pages,
        "rounds": len(rounds),
        "mergemem_merge_ns": per_page(lambda one: one["mergemem"]["cpu_ns"]),
        "ksm_checksum_pass_ns": per_page(lambda one: one["ksm_merge_passes_ns"][0]),
        "ksm_merge_pass_ns": per_page(lambda one: one["ksm_merge_passes_ns"][1]),
        "ksm_unique_pass_ns": per_page(lambda one: one["ksm_scan_only_passes_ns"][1]),
        "ksm_without_checksums_ns": per_page(
            lambda one: one["ksm_merge_passes_ns"][1] - one["ksm_merge_passes_ns"][0]
        ),
        "ksm_functions_ns": 1000 * outermost_us(directory / "ksm.graph") / pages,
        "ksm_functions": facts["ksm_functions"],
        "ksm_flushes": flushes["ksm"] / flushes["pages"],
        "mergemem_flushes": flushes["mergemem"] / flushes["pages"],
        "checksum_full_ns": asdict(full),
        "checksum_sampled_ns": asdict(sampled),
        "split_folios": facts["locks"]["split_folios"],
        "locks": {
            operation: {kind: asdict(held) for kind, held in locks.read(directory / trace).items()}
            for operation, trace in facts["locks"].items()
            if operation != "split_folios"
        },
    }


def outermost_us(graph: Path) -> float:
    """The time of calls that are within no other, less what the tracer adds to each.

    Every call is taken to have that in it of which the shortest one, of a function that does next
    to nothing, consists.
    """
    calls = _CALL.findall(graph.read_text(encoding="ascii", errors="replace"))
    if not calls:
        raise ValueError(f"{graph}: no call was traced")
    least = min(len(indent) for _, indent, _, _ in calls)
    tracer_us = min(float(time_us) for time_us, _, _, _ in calls)
    return sum(
        float(time_us) - tracer_us for time_us, indent, _, _ in calls if len(indent) == least
    )
