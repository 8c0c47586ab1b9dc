# SPDX-License-Identifier: MIT
"""From the facts of a run to what it means: figures, verdict, table. All of it is computed here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.demo.latecomer import PAGES as LATECOMERS_PAGES
from tests.demo.load import Response, in_window, read_log

PAGE_BYTES = 4096
MIB = 1 << 20
REQUIRED_SHARE = 0.9
# The two witnesses of freed memory may differ by what else the system allocates or frees
# meanwhile: page tables, slabs, the module itself.
CROSS_CHECK_SHARE = 0.1
CROSS_CHECK_BYTES = 4 * MIB


@dataclass(frozen=True)
class Latency:
    """Of the responses in one window of time."""

    responses: int
    p50_seconds: float
    p99_seconds: float


@dataclass(frozen=True)
class Run:
    """What the guest wrote down, and what only the host knows about it."""

    facts: dict[str, Any]
    responses: list[Response]
    accelerator: str
    wall_seconds: float
    kernel_log: Sequence[str]

    def act(self, name: str) -> tuple[float, float]:
        """When an act began and ended, by the guest's monotonic clock."""
        found = next(act for act in self.facts["acts"] if act["name"] == name)
        return found["start_seconds"], found["end_seconds"]

    def latency(self, act: str) -> Latency:
        latencies = sorted(
            response.latency_seconds for response in in_window(self.responses, *self.act(act))
        )
        return Latency(len(latencies), _percentile(latencies, 50), _percentile(latencies, 99))


def load_run(
    directory: Path, accelerator: str, wall_seconds: float, kernel_log: Sequence[str]
) -> Run:
    facts = json.loads((directory / "facts.json").read_text(encoding="utf-8"))
    responses = read_log(directory / "responses.log")
    return Run(facts, responses, accelerator, wall_seconds, kernel_log)


def figures(run: Run) -> dict[str, Any]:
    """report.json: first the keys that tools rely on, then what else is good to know."""
    facts = run.facts
    before, after, end = facts["before"], facts["after"], facts["end"]
    inspected = facts["inspected"]
    # What the kernel's zero page has freed is apart from what merging has.
    zero_freed_frames = int(facts["metrics"]["mergemem_zero_freed_pages_total"])
    freed_frames = before["sample"]["frames"] - after["frames"] - zero_freed_frames
    latencies = {
        name: {
            "responses": found.responses,
            "p50_seconds": found.p50_seconds,
            "p99_seconds": found.p99_seconds,
        }
        for name, found in ((name, run.latency(name)) for name in ("before", "merge", "after"))
    }
    return {
        "kernel": facts["kernel"],
        "accelerator": run.accelerator,
        "frames_before": before["sample"]["frames"],
        "frames_after": after["frames"],
        "census_duplicate_frames": facts["census_duplicate_frames"],
        "freed_bytes": freed_frames * PAGE_BYTES,
        # Page-table entries of the fleet that map a merged page.
        "merged_pages": after["merged_mappings"],
        # How many more map the kernel's zero page: no part of what merging frees.
        "zero_pages": after["zero_mappings"] - before["sample"]["zero_mappings"],
        "zero_freed_bytes": zero_freed_frames * PAGE_BYTES,
        # What it has cost: huge pages that were split, and how much was mapped as such.
        "split_huge_pages": int(facts["metrics"]["mergemem_module_split_folios_total"]),
        "huge_bytes_before": facts["huge_bytes_before"],
        "huge_bytes_after": facts["huge_bytes_after"],
        "agent_cpu_seconds": facts["agent"]["cpu_seconds"],
        "wall_seconds": run.wall_seconds,
        "responses": len(run.responses) + inspected["responses"],
        "wrong_responses": sum(not response.right for response in run.responses)
        + inspected["wrong_responses"],
        "checked_pages": inspected["checked_pages"],
        "wrong_pages": inspected["wrong_pages"],
        "kernel_log_findings": len(run.kernel_log),
        # Both witnesses at the same two instants: the census done, the agent stopped.
        "cross_check_frames_bytes": PAGE_BYTES
        * (before["sample"]["frames"] - end["sample"]["frames"]),
        "cross_check_free_memory_bytes": _free_bytes(end) - _free_bytes(before),
        "cross_check_mem_free_alone_bytes": end["mem_free_bytes"] - before["mem_free_bytes"],
        "census_share": freed_frames / facts["census_duplicate_frames"],
        "checked_objects": inspected["checked_objects"],
        "agent_start_cpu_seconds": facts["agent_start_cpu_seconds"],
        "agent_budget_ratio": facts["metrics"]["mergemem_budget_ratio"],
        "last_write_to_merged_seconds": facts["last_write_to_merged_seconds"],
        "latecomers_merged_pages": facts["latecomers_merged_pages"],
        "hints": facts["hints"],
        "agent_stop_seconds": facts["agent"]["seconds"],
        "latency": latencies,
        "kernel_log": list(run.kernel_log),
    }


def failures(report: dict[str, Any]) -> list[str]:
    """Why the run is not good enough; nothing if it is."""
    found = []
    if report["census_share"] < REQUIRED_SHARE:
        found.append(
            f"{report['census_share']:.1%} of the census reached, {REQUIRED_SHARE:.0%} are required"
        )
    for key in ("responses", "checked_pages"):
        if not report[key]:
            found.append(f"{key} is 0: nothing was checked")
    for key in ("wrong_responses", "wrong_pages", "kernel_log_findings"):
        if report[key]:
            found.append(f"{key} is {report[key]}, not 0")
    if report["latecomers_merged_pages"] < LATECOMERS_PAGES:
        found.append(f"latecomers share {report['latecomers_merged_pages']} pages")
    if report["hints"]["source"] != "bpf":
        found.append(f"hints come from {report['hints']['source']}, not from BPF")
    found += [f"kernel log: {line}" for line in report["kernel_log"]]
    by_frames, by_memory = (
        report["cross_check_frames_bytes"],
        report["cross_check_free_memory_bytes"],
    )
    if abs(by_frames - by_memory) > CROSS_CHECK_BYTES + CROSS_CHECK_SHARE * by_frames:
        found.append(
            f"pagemap says {by_frames / MIB:.0f} MiB were freed, "
            f"free memory says {by_memory / MIB:.0f} MiB"
        )
    return found


def table(report: dict[str, Any]) -> str:
    """The short table for a person."""
    before, after = report["frames_before"], report["frames_after"]
    latency = report["latency"]
    rows = {
        "kernel": f"{report['kernel']} ({report['accelerator']})",
        "fleet memory before": _mib(before * PAGE_BYTES),
        "fleet memory after": _mib(after * PAGE_BYTES),
        "freed by merging": f"{_mib(report['freed_bytes'])}, "
        f"{report['freed_bytes'] / PAGE_BYTES / before:.0%} of it",
        "at the cost of": f"{report['split_huge_pages']:,} huge pages split; "
        f"{_mib(report['huge_bytes_before'])} were in huge pages, now "
        f"{_mib(report['huge_bytes_after'])}",
        "besides, zeros": f"{_mib(report['zero_freed_bytes'])} freed, "
        f"{report['zero_pages']:,} more mappings of the zero page",
        "share of the census": f"{report['census_share']:.1%} of "
        f"{report['census_duplicate_frames']:,} duplicates",
        "cross-check": "free memory grew by "
        f"{_mib(report['cross_check_free_memory_bytes'])} while the frames became "
        f"{_mib(report['cross_check_frames_bytes'])} less",
        "last write to merged": f"{report['last_write_to_merged_seconds']:.1f} s, by hints "
        f"({report['hints']['source']}), for two processes that came late",
        "agent's CPU": f"{report['agent_cpu_seconds']:.1f} s, "
        f"{report['agent_start_cpu_seconds']:.1f} s of it to start; "
        f"budget {report['agent_budget_ratio']:.0%} of one core",
        "responses checked": f"{report['responses']:,}, {report['wrong_responses']} wrong",
        "pages checked": f"{report['checked_pages']:,}, {report['wrong_pages']} wrong",
        "objects checked": f"{report['checked_objects']:,}",
        "latency p50 / p99": ", ".join(
            f"{word} {latency[act]['p50_seconds'] * 1000:.0f} / "
            f"{latency[act]['p99_seconds'] * 1000:.0f} ms"
            for word, act in (("before", "before"), ("during", "merge"), ("after", "after"))
        ),
        "kernel log": f"{report['kernel_log_findings']} findings",
        "time": f"{report['wall_seconds']:.0f} s",
    }
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}   {value}" for name, value in rows.items())


def _free_bytes(instant: dict[str, Any]) -> int:
    """MemFree and what the per-CPU lists hold, which it leaves out."""
    return int(instant["mem_free_bytes"] + instant["per_cpu_lists_bytes"])


def _percentile(ascending: Sequence[float], percent: int) -> float:
    """Nearest rank."""
    if not ascending:
        return float("nan")
    return ascending[max(0, -(-len(ascending) * percent // 100) - 1)]


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:,.0f} MiB"
