# SPDX-License-Identifier: MIT
"""The figures of make bench-kmod as Markdown, with the targets and whether they were reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Figures = dict[str, Any]

FLUSHES_PER_PAGE = 0.05
MERGE_SHARE_OF_KSM = 0.25
CHECKSUM_RATIO = 8.0
LOCK_MS = 20.0


@dataclass(frozen=True)
class Target:
    """A figure that is promised, how it is read, and what it may be."""

    name: str
    promise: str
    value: Callable[[Figures], float]
    reached: Callable[[float], bool]


def merge_share(found: Figures) -> float:
    """CPU of a merge, as a share of what ksmd takes for one, scanning left out."""
    return float(found["mergemem_merge_ns"]["median"] / found["ksm_without_checksums_ns"]["median"])


def checksum_ratio(found: Figures) -> float:
    """How many sampled checksums take the CPU of a full one."""
    full, sampled = found["checksum_full_ns"], found["checksum_sampled_ns"]
    return float(full["median"] / sampled["median"])


def longest_ms(found: Figures) -> float:
    """The longest that any lock was held, by any request."""
    return (
        max(
            float(held["longest_us"])
            for operation in found["locks"].values()
            for held in operation.values()
        )
        / 1000
    )


TARGETS = (
    Target(
        "TLB flushes per merged page",
        f"at most {FLUSHES_PER_PAGE}",
        lambda found: float(found["mergemem_flushes"]),
        lambda value: value <= FLUSHES_PER_PAGE,
    ),
    Target(
        "CPU per merged page, as a share of ksmd's",
        f"at most {MERGE_SHARE_OF_KSM}",
        merge_share,
        lambda value: value <= MERGE_SHARE_OF_KSM,
    ),
    Target(
        "full checksum / checksum of 256 bytes, CPU",
        f"at least {CHECKSUM_RATIO:g}",
        checksum_ratio,
        lambda value: value >= CHECKSUM_RATIO,
    ),
    Target(
        "longest that a lock was held, ms",
        f"at most {LOCK_MS:g}",
        longest_ms,
        lambda value: value <= LOCK_MS,
    ),
)


def markdown(report: dict[str, dict[str, Figures]]) -> str:
    """All tables; `report` has "times" and "instructions" for each kernel."""
    guests = ", ".join(_where(name, found["times"]) for name, found in report.items())
    words = (
        f"{guests} of the host. Medians of several rounds (lowest to highest). **time**: CPU time "
        "in that guest, worth little where the load is above 1; **instr.**: instructions of one "
        "emulated processor, which hardly depend on it."
    )
    return "\n\n".join([words, _targets(report), _costs(report), _locks(report)]) + "\n"


def _where(name: str, found: Figures) -> str:
    emulated = "emulated (TCG)" if found["accelerator"] == "tcg" else found["accelerator"]
    return f"{name}: {found['release']}, {emulated}, load {found['host_load']:.1f} per processor"


def _targets(report: dict[str, dict[str, Figures]]) -> str:
    header = ["target", "promised"]
    header += [f"{kernel} {kind}" for kernel in report for kind in ("time", "instr.")]
    rows = []
    for target in TARGETS:
        cells = [target.name, target.promise]
        for guests in report.values():
            for kind in ("times", "instructions"):
                value = target.value(guests[kind])
                cells.append(f"{value:.3g} {'reached' if target.reached(value) else '**missed**'}")
        rows.append(cells)
    return table(header, rows)


def _costs(report: dict[str, dict[str, Figures]]) -> str:
    rows = {
        "MERGE request, per merged page": "mergemem_merge_ns",
        "ksmd: pass that merges, per page": "ksm_merge_pass_ns",
        "ksmd: pass over the same pages that only takes checksums": "ksm_checksum_pass_ns",
        "ksmd: the difference of these two": "ksm_without_checksums_ns",
        "ksmd: pass over unique pages, tree search with it": "ksm_unique_pass_ns",
        "checksum, full": "checksum_full_ns",
        "checksum, 256 bytes": "checksum_sampled_ns",
    }
    plain = {
        "ksmd: merging functions alone, by the function graph tracer": "ksm_functions_ns",
        "TLB flushes per merged page, mergemem": "mergemem_flushes",
        "TLB flushes per merged page, ksmd": "ksm_flushes",
    }
    header = ["per page"]
    header += [f"{name} {kind}" for name in report for kind in ("time, ns", "instr.")]
    cells = []
    for title, key in rows.items():
        values = [guests[kind][key] for guests in report.values() for kind in guests]
        cells.append([title, *map(_spread, values)])
    for title, key in plain.items():
        values = [guests[kind][key] for guests in report.values() for kind in guests]
        cells.append(
            [title, *(f"{value:,.0f}" if value > 10 else f"{value:.3f}" for value in values)]
        )
    return table(header, cells)


def _locks(report: dict[str, dict[str, Figures]]) -> str:
    rows = []
    for name, guests in report.items():
        for operation, kinds in guests["times"]["locks"].items():
            for kind, held in kinds.items():
                counted = guests["instructions"]["locks"][operation][kind]
                cells = [name, operation, kind, f"{held['times']:,}"]
                for key in ("median_us", "p99_us", "longest_us"):
                    cells += [f"{one[key] / 1000:.2f}" for one in (held, counted)]
                rows.append(cells)
    header = ["kernel", "request", "lock", "times"]
    for word in ("median", "99 %", "longest"):
        header += [f"{word}, ms", "M instr."]
    return table(header, rows)


def _spread(found: dict[str, float]) -> str:
    return f"{found['median']:,.0f} ({found['lowest']:,.0f} to {found['highest']:,.0f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
