# SPDX-License-Identifier: MIT
"""What the agent takes with nothing to gain, at 4 GiB: boot, measure, judge, write the table.

    make bench-idle                 # or with KERNEL=6.12

Leaves build/bench/idle.json and build/bench/idle.md. A missed target is a finding, not a failure.
Wrong bytes, a process that died, or a complaint in the kernel log is one.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from itertools import pairwise
from typing import Any

from tests.bench import idle_guest
from tests.bench.each_kernel import DIRECTORY, each_kernel
from tests.bench.race import workload
from tests.bench.race.targets import IDLE_PERCENT
from tests.bench.table import table
from tests.vm.guest import Guest

TIME_LIMIT_SECONDS = 2400
MEMORY_MIB = 6144
STAGES = ("targets", "scan", "index", "merge")

Figures = dict[str, Any]


def measure(kernel: str) -> Figures:
    """One guest run."""
    directory = DIRECTORY / f"idle-{kernel}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    words = [sys.executable, "-m", idle_guest.__name__, str(directory)]
    guest = Guest(kernel=kernel, memory_mib=MEMORY_MIB)
    result = guest.run(words, time_limit_seconds=TIME_LIMIT_SECONDS).check()
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    facts = json.loads((directory / "facts.json").read_text(encoding="utf-8"))
    where = {"release": result.release, "accelerator": result.accelerator, "host_load": load}
    return where | figures(facts)


def figures(facts: Figures) -> Figures:
    """Of each minute and of all; memory for each page that is tracked."""
    moments, tracked = facts["moments"], facts["done"]["memory"]["remembered_pages"]
    minutes = [between(*pair) for pair in pairwise(moments)]
    grown = facts["memory"]["Rss"] - facts["start"]["memory_before"]["Rss"]
    return {
        "pages": facts["pages"],
        "tracked_pages": tracked,
        "merged_pages": facts["done"]["memory"]["merged_pages"],
        "fill_seconds": facts["fill_seconds"],
        "through_seconds": facts["done"]["seconds"],
        "minutes": minutes,
        "whole": between(moments[0], moments[-1]),
        "later": between(moments[len(moments) // 2], moments[-1]),
        "scrape_seconds": facts["scrape_seconds"],
        "rss_bytes": facts["memory"]["Rss"],
        "rss_bytes_per_page": facts["memory"]["Rss"] / tracked,
        "grown_bytes_per_page": grown / tracked,
    }


def between(before: Figures, after: Figures) -> Figures:
    """What the agent took and did from one moment to another; percentages of a core."""
    seconds = after["at"] - before["at"]
    spent = {
        name: 100 * (after["stages"].get(name, 0.0) - before["stages"].get(name, 0.0)) / seconds
        for name in STAGES
    }
    others = after["threads"]["others"]["ns"] - before["threads"]["others"]["ns"]
    return {
        "seconds": seconds,
        "percent": (after["cpu_ns"] - before["cpu_ns"]) / 1e7 / seconds,
        "other_threads_percent": others / 1e7 / seconds,
        "stages_percent": spent,
        "sleeps": {
            name: after["threads"][name]["sleeps"] - before["threads"][name]["sleeps"]
            for name in after["threads"]
        },
        "pages": {
            name: after["pages"][name] - before["pages"][name]
            for name in ("scanned", "sampled", "checksummed")
        },
        "rounds": after["rounds"] - before["rounds"],
    }


def markdown(report: dict[str, Figures]) -> str:
    """One table for each kernel."""
    return "\n\n".join(_kernel(name, found) for name, found in report.items()) + "\n"


def _kernel(name: str, found: Figures) -> str:
    emulated = "emulated" if found["accelerator"] == "tcg" else found["accelerator"]
    later = found["later"]["percent"]
    verdict = "reached" if later < IDLE_PERCENT else "**missed**"
    least = min(minute["percent"] for minute in found["minutes"])
    words = (
        f"{name}: Linux {found['release']}, {emulated}, load {found['host_load']:.1f} per "
        f"processor of the host. {found['tracked_pages']:,} pages tracked, "
        f"{found['merged_pages']:,} of them merged. Promised: under {IDLE_PERCENT:g} % of a core; "
        f"{later:.2f} % in the later half: {verdict}; {least:.2f} % in the quietest minute. "
        f"The agent has {found['rss_bytes'] / 2**20:.0f} MiB (RSS), "
        f"{found['rss_bytes_per_page']:.0f} bytes for each page tracked; "
        f"{found['grown_bytes_per_page']:.0f} bytes of that came with the pages. "
        f"A scrape costs {1000 * found['scrape_seconds']:.0f} ms of CPU time; none was made."
    )
    header = ["minute", "% of a core", "other threads", *STAGES]
    header += ["pages looked at", "sampled", "read in full", "main wakes", "others wake"]
    rows = [_row(str(number), one) for number, one in enumerate(found["minutes"], start=1)]
    rows += [_row("all", found["whole"]), _row("later half", found["later"])]
    return f"{words}\n\n{table(header, rows)}"


def _row(title: str, one: Figures) -> list[str]:
    percents = [one["percent"], one["other_threads_percent"], *one["stages_percent"].values()]
    cells = [title, *(f"{percent:.3f}" for percent in percents)]
    counts = [*one["pages"].values(), *one["sleeps"].values()]
    return cells + [f"{count:,}" for count in counts]


def main() -> int:
    """0, or the guest's verdict."""
    return each_kernel("idle", workload.build, measure, markdown)


if __name__ == "__main__":
    sys.exit(main())
