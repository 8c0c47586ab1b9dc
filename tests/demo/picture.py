# SPDX-License-Identifier: MIT
"""The picture: the fleet's memory over time, with what happened when, and what customers felt."""

from __future__ import annotations

from math import nan
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib import pyplot

from tests.demo.report import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGES_PER_MIB = 256
LATENCY_BIN_SECONDS = 3.0
# Of the labels of acts, as parts of the picture's width and height.
LABEL_ROWS, LABEL_WIDTH, LABEL_HEIGHT = 3, 0.085, 0.065

MEMORY, POSSIBLE, WRONG, INK, PALE = "#2a6f97", "#c1121f", "#d00000", "#333333", "#f1f1ee"
# What each act is called in the picture.
LABELS = {
    "warm": "work breaks\nfork's sharing",
    "before": "customers\nonly",
    "estimate": "mergemem\nestimate",
    "merge": "mergemem agent\nmerges",
    "after": "customers\nonly",
    "check": "all pages\nchecked",
    "hints": "two processes\ncome late",
    "unmerge": "one worker\nunmerged",
    "unload": "module\nunloaded",
    "read": "every worker\nreads all it has",
}


def draw(run: Run, report: dict[str, Any], path: Path) -> None:
    """Write the picture as a PNG."""
    matplotlib.use("Agg")
    figure, (memory, latency) = pyplot.subplots(
        2, 1, sharex=True, figsize=(13, 8), dpi=110, height_ratios=(3, 1), layout="constrained"
    )
    origin = run.facts["samples"][0]["seconds"]
    freed = report["freed_bytes"] / (1 << 20)
    figure.suptitle(
        f"A gunicorn fleet gives back {freed:,.0f} MiB of "
        f"{report['frames_before'] / PAGES_PER_MIB:,.0f} MiB while it serves: "
        f"{report['responses']:,} responses, {report['wrong_responses']} wrong",
        fontsize=15,
        color=INK,
    )
    _draw_memory(memory, run, report, origin)
    _draw_acts(memory, latency, run, origin)
    _draw_latency(latency, run, origin)
    for axes in (memory, latency):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.savefig(path)
    pyplot.close(figure)


def _draw_memory(axes: Axes, run: Run, report: dict[str, Any], origin: float) -> None:
    samples = run.facts["samples"]
    seconds = [sample["seconds"] - origin for sample in samples]
    used_mib = [sample["frames"] / PAGES_PER_MIB for sample in samples]
    axes.fill_between(seconds, used_mib, color=MEMORY, alpha=0.25, linewidth=0)
    axes.plot(seconds, used_mib, color=MEMORY, linewidth=2.5)

    before = report["frames_before"] / PAGES_PER_MIB
    after = report["frames_after"] / PAGES_PER_MIB
    freed = report["freed_bytes"] / (1 << 20)
    possible = before - report["census_duplicate_frames"] / PAGES_PER_MIB
    start, end = run.act("estimate")[1] - origin, run.act("check")[1] - origin
    axes.plot([start, end], [possible] * 2, color=POSSIBLE, linestyle="--", linewidth=1.5)
    axes.text(
        start, possible, "least possible, by the census  ", color=POSSIBLE, ha="right", va="center"
    )
    axes.plot([start, end], [before] * 2, color=INK, linestyle=":", linewidth=1)
    middle = run.act("after")[0] - origin
    arrow = {"arrowstyle": "<->", "color": INK, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.5}
    axes.annotate("", (middle, after), (middle, before), arrowprops=arrow)
    axes.text(
        middle,
        (before + after) / 2,
        f"  {freed:,.0f} MiB freed\n  {report['census_share']:.0%} of the duplicates\n"
        f"  {report['split_huge_pages']} huge pages split",
        fontsize=13,
        fontweight="bold",
        va="center",
        color=INK,
    )
    axes.set_ylim(0, max(used_mib) * 1.3)
    axes.set_ylabel("memory of the fleet, MiB\n(frames counted through pagemap)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)


def _draw_acts(memory: Axes, latency: Axes, run: Run, origin: float) -> None:
    """A band for each act, its name at the top, in the highest row that is free there."""
    acts = run.facts["acts"]
    total = acts[-1]["end_seconds"] - origin
    taken_until = [0.0] * LABEL_ROWS
    for number, act in enumerate(acts):
        start, end = act["start_seconds"] - origin, act["end_seconds"] - origin
        for axes in (memory, latency):
            axes.axvspan(start, end, color=PALE if number % 2 else "white", zorder=0)
        middle, half = (start + end) / 2, LABEL_WIDTH * total / 2
        row = next((row for row, taken in enumerate(taken_until) if taken <= middle - half), 0)
        taken_until[row] = middle + half
        memory.text(
            min(middle, total - half),
            0.995 - row * LABEL_HEIGHT,
            LABELS[act["name"]],
            transform=memory.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=9,
            color=INK,
        )
    latency.set_xlim(0, total)


def _draw_latency(axes: Axes, run: Run, origin: float) -> None:
    """Every response is a dot; the line is the median of a few seconds."""
    right = [response for response in run.responses if response.right]
    wrong = [response for response in run.responses if not response.right]
    axes.scatter(
        [response.end_seconds - origin for response in right],
        [response.latency_seconds * 1000 for response in right],
        s=5,
        color=MEMORY,
        alpha=0.35,
        linewidths=0,
    )
    if wrong:
        axes.scatter(
            [response.end_seconds - origin for response in wrong],
            [response.latency_seconds * 1000 for response in wrong],
            s=60,
            color=WRONG,
            marker="x",
            label="wrong",
        )
        axes.legend()
    bins: dict[int, list[float]] = {}
    for response in right:
        number = int((response.end_seconds - origin) // LATENCY_BIN_SECONDS)
        bins.setdefault(number, []).append(response.latency_seconds * 1000)
    numbers = range(max(bins, default=-1) + 1)
    axes.plot(
        [(number + 0.5) * LATENCY_BIN_SECONDS for number in numbers],
        # No line where nothing was answered.
        [median(bins[number]) if number in bins else nan for number in numbers],
        color=INK,
        linewidth=1.5,
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("response, ms\n(line: median)")
    axes.set_xlabel("seconds")
