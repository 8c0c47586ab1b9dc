# SPDX-License-Identifier: MIT
"""From what a guest wrote down to the figures of one case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tests.bench.figures import Spread
from tests.bench.race import curve
from tests.bench.race.cases import CONTESTANTS, NOBODY, Case
from tests.bench.race.churn import CHURN_PART
from tests.bench.race.curve import Point

GIB = float(1 << 30)
Figures = dict[str, Any]


def figures(case: Case, facts: dict[str, Any]) -> Figures:
    """All of one case on one kernel."""
    contestants = {}
    for name in (NOBODY, *CONTESTANTS):
        runs = [run for run in facts["runs"] if run["contestant"] == name]
        if runs:
            contestants[name] = _contestant(case, facts, runs)
    return {
        "release": facts["release"],
        "accelerator": facts["accelerator"],
        "host_load": facts["host_load"],
        "guest_seconds": facts["guest_seconds"],
        "window_seconds": case.window_seconds,
        "census_bytes": stable_duplicates(case, facts["nobody"]) * curve.PAGE_BYTES,
        "contestants": contestants,
    }


def stable_duplicates(case: Case, run: dict[str, Any], shared_by_fork: int | None = None) -> int:
    """The census of a run, in frames: what can come back, and stay.

    Pages that are rewritten all the time are equal, and no part of it.
    """
    if shared_by_fork is None:
        shared_by_fork = run["baseline"]["shared_by_fork"]
    duplicates = int(run["census"]["mappings"] - run["census"]["contents"] - shared_by_fork)
    if case.kind == "churn":
        duplicates -= (case.processes - 1) * (case.pages_each // CHURN_PART)
    return duplicates


def _contestant(case: Case, facts: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Figures:
    """Medians and spread over the rounds; what is counted apart, of the run that counted it."""
    timed = [run for run in runs if not run["instrumented"]]
    shared_by_fork = facts["nobody"]["baseline"]["shared_by_fork"]
    each = [_run(case, run, shared_by_fork, facts["ticks_per_second"]) for run in timed]
    found: Figures = {"rounds": len(timed)}
    for key in each[0]["values"]:
        values = [one["values"][key] for one in each]
        if None in values:
            # A figure that some rounds did not reach has no median.
            found[key] = None
        else:
            found[key] = asdict(Spread.of(values))
    found["curve"] = each[0]["curve"]
    found["start_cpu_seconds"] = timed[0]["start"].get("start_cpu_seconds", 0.0)
    found["stages"] = _stages(timed[-1].get("metrics", {}))
    for run in runs:
        if run["instrumented"]:
            saved = run["at_census"]["mappings"] - run["at_census"]["frames"] - shared_by_fork
            found["flushes_per_page"] = run["flushes"] / max(1, saved)
        if "breaks" in run:
            merged, broken = run["breaks"]["merged"], run["breaks"]["broken"]
            found["breaks"] = run["breaks"] | {"share": broken / max(1, merged)}
    if latencies := [one for run in timed for one in run.get("server", {}).get("latencies", [])]:
        found["latency"] = {
            key: asdict(Spread.of([one[key] for one in latencies])) for key in latencies[0]
        }
        found["latency"]["batches"] = len(latencies)
    return found


def _run(case: Case, run: dict[str, Any], shared_by_fork: int, ticks: int) -> dict[str, Any]:
    duplicates = stable_duplicates(case, run, shared_by_fork)
    looks = curve.points(run, shared_by_fork, duplicates, ticks)
    end = curve.point(run["at_census"], 0.0, shared_by_fork, duplicates, ticks)
    window = curve.at(looks, case.window_seconds)
    enough = curve.reached(looks)
    pages = run["census"]["mappings"]
    metadata_bytes = run.get("metadata_bytes", 0)
    idle = run.get("idle")
    values = {
        "seconds_to_95": max(0.0, enough.seconds) if enough else None,
        "cpu_seconds_to_95": enough.cpu_seconds if enough else None,
        "cpu_per_gib_to_95": _per_gib(enough) if enough else None,
        "window_cpu_seconds": window.cpu_seconds,
        "window_share": window.share,
        "window_cpu_per_gib": _per_gib(window),
        "system_share": window.system_share,
        "share": end.share,
        "saved_bytes": end.saved_bytes,
        "metadata_bytes": metadata_bytes,
        "metadata_bytes_per_page": metadata_bytes / pages,
        "scanner_bytes": run.get("scanner_bytes", 0),
        "net_saved_bytes": end.saved_bytes - metadata_bytes - run.get("scanner_bytes", 0),
        "interrupts": run["interrupts"]["tlb_shootdowns"],
        "function_calls": run["interrupts"]["function_calls"],
        "idle_percent": 100 * idle["cpu_seconds"] / idle["seconds"] if idle else None,
    }
    return {"values": values, "curve": [_told(one) for one in looks]}


def _per_gib(one: Point) -> float | None:
    """CPU seconds; None where next to nothing was saved."""
    return one.cpu_seconds / (one.saved_bytes / GIB) if one.share > 0.01 else None


def _told(one: Point) -> list[float]:
    return [round(one.seconds, 2), round(one.share, 4), round(one.cpu_seconds, 3)]


def _stages(metrics: dict[str, float]) -> dict[str, float]:
    """What the agent says of its own CPU time, since it was started."""
    prefixes = ("mergemem_stage_cpu_seconds_total", "mergemem_cpu_seconds_total")
    return {
        name.split('"')[1]: value for name, value in metrics.items() if name.startswith(prefixes)
    }


def middle(found: Figures, name: str, key: str) -> float | None:
    """The median of a contestant's figure; None where there is none."""
    spread = found["contestants"].get(name, {}).get(key)
    return float(spread["median"]) if spread else None
