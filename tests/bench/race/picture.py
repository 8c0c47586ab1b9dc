# SPDX-License-Identifier: MIT
"""The race as pictures: how fast the memory came back, and what that has cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from tests.bench.race import beside
from tests.bench.race.cases import (
    CASES,
    DEFAULTS,
    FLAT_OUT,
    HELD_PERCENT,
    KSMD_HELD,
    MERGEMEM,
    MERGEMEM_HELD,
)
from tests.bench.race.colors import INK, OURS, STYLES, TARGET, THEIRS
from tests.bench.race.curve import WANTED_SHARE
from tests.bench.race.figures import Figures, middle
from tests.bench.race.targets import CPU_SHARE, CPU_SHARE_UNIQUE, FIFTH_CASES

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

LABELS = {
    MERGEMEM_HELD: f"mergemem, {HELD_PERCENT} % of a core",
    KSMD_HELD: f"ksmd, {HELD_PERCENT} % of a core",
}
# The promises of the bars, as parts of flat-out ksmd's.
PROMISES = {**dict.fromkeys(FIFTH_CASES, CPU_SHARE), "unique": CPU_SHARE_UNIQUE}
BARS = ((MERGEMEM, OURS), (FLAT_OUT, THEIRS), (DEFAULTS, STYLES[DEFAULTS][0]))
CURVE_CASES = tuple(case for case in CASES if case.name not in ("idle", "server"))
SHOWN_SECONDS = 40.0
HIGHEST_SHARE = 1.25


def draw(kernel: str, report: dict[str, Figures], directory: Path) -> list[Path]:
    """Three pictures of one kernel."""
    matplotlib.use("Agg")
    release = next(iter(report.values()))["release"]
    paths = [directory / f"race-{what}-{kernel}.png" for what in ("curves", "cpu", "beside")]
    _curves(report, paths[0], release)
    _bars(report, paths[1], release)
    beside.draw(report, paths[2], release)
    return paths


def _curves(report: dict[str, Figures], path: Path, release: str) -> None:
    figure, grid = pyplot.subplots(
        2, 3, figsize=(15, 8.5), dpi=100, sharey=True, layout="constrained"
    )
    figure.suptitle(
        f"How much of the duplicate memory has come back, and when (Linux {release}, emulated)",
        fontsize=15,
        color=INK,
    )
    handles: dict[str, Artist] = {}
    for axes, case in zip(grid.flat, CURVE_CASES, strict=True):
        axes.set_title(f"{case.number}. {case.title}", fontsize=11, color=INK)
        if case.name in report:
            handles |= _case(axes, report[case.name])
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    for axes in grid[:, 0]:
        axes.set_ylabel("share of the exact census")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for axes in grid[1]:
        axes.set_xlabel("seconds since the processes filled their memory")
    labels = [LABELS.get(name, name) for name in handles]
    figure.legend(list(handles.values()), labels, loc="outside lower center", ncols=6)
    figure.savefig(path)
    pyplot.close(figure)


def _case(axes: Axes, found: Figures) -> dict[str, Artist]:
    handles: dict[str, Artist] = {}
    end = 0.0
    for name, (color, line, width) in STYLES.items():
        one = found["contestants"].get(name)
        if one:
            seconds = [point[0] for point in one["curve"]]
            shares = [point[1] for point in one["curve"]]
            handles[name] = axes.plot(
                seconds, shares, color=color, linestyle=line, linewidth=width
            )[0]
            end = max(end, seconds[-1])
    axes.axhline(WANTED_SHARE, color=INK, linestyle=":", linewidth=1)
    first = min((one["curve"][0][0] for one in found["contestants"].values()), default=0.0)
    axes.set_xlim(min(0.0, max(first, -30.0)), min(end, max(SHOWN_SECONDS, 1.0)))
    axes.set_ylim(-0.03, HIGHEST_SHARE)
    highest = max(
        (point[1] for one in found["contestants"].values() for point in one["curve"]), default=0
    )
    if highest > 1.05:
        axes.text(
            0.98, 0.5, "above 100 %: pages that are\nabout to be written to again",
            transform=axes.transAxes, ha="right", fontsize=9, color=INK,
        )  # fmt: skip
    return handles


def _bars(report: dict[str, Figures], path: Path, release: str) -> None:
    figure, panels = pyplot.subplots(
        1, 2, figsize=(14, 6), dpi=100, sharey=True, layout="constrained"
    )
    figure.suptitle(
        f"CPU time per GiB saved: below the green line is the promise (Linux {release}, emulated)",
        fontsize=15,
        color=INK,
    )
    titles = {
        "cpu_per_gib_to_95": "until 95 % of the census has come back",
        "window_cpu_per_gib": "from before the start to the end of the window",
    }
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        _panel(axes, report, key)
        axes.set_title(title, fontsize=12, color=INK)
    panels[0].set_ylabel("CPU seconds per GiB, logarithmic")
    handles: list[Artist] = [Patch(color=color, label=name) for name, color in BARS]
    handles.append(Line2D([], [], color=TARGET, linewidth=3, label="promised to mergemem"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    figure.savefig(path)
    pyplot.close(figure)


def _panel(axes: Axes, report: dict[str, Figures], key: str) -> None:
    cases = [case for case in CASES if case.name in PROMISES]
    for place, case in enumerate(cases):
        if case.name not in report:
            _note(axes, place, "not measured", INK)
            continue
        for number, (name, color) in enumerate(BARS):
            if name not in report[case.name]["contestants"]:
                continue
            value = middle(report[case.name], name, key)
            at = place + (number - 1) * 0.27
            if value is None:
                _note(axes, at, "not reached", color)
                continue
            axes.bar(at, value, 0.25, color=color)
            axes.text(at, value, f"{value:,.0f}", ha="center", va="bottom", fontsize=8)
            if name == FLAT_OUT:
                promise = value * PROMISES[case.name]
                axes.plot([place - 0.42, place + 0.42], [promise] * 2, color=TARGET, linewidth=3)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(range(len(cases)), [f"{case.number}. {case.name}" for case in cases])
    axes.set_xlim(-0.6, len(cases) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)


def _note(axes: Axes, place: float, text: str, color: str) -> None:
    """Where a bar would be."""
    axes.text(
        place, 0.02, text, transform=axes.get_xaxis_transform(), rotation=90, ha="center",
        va="bottom", fontsize=8, color=color,
    )  # fmt: skip
