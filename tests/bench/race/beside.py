# SPDX-License-Identifier: MIT
"""The third picture: what a scanner is to those who run beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import pyplot

from tests.bench.race.colors import INK, STYLES, TARGET
from tests.bench.race.figures import Figures
from tests.bench.race.targets import BROKEN_SHARE, IDLE_PERCENT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Value = Callable[[Figures], float | None]


def draw(report: dict[str, Figures], path: Path, release: str) -> None:
    """Merges in vain, the cost of being idle, a server's response times."""
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 5), dpi=100, layout="constrained")
    figure.suptitle(
        f"Beside the scanners: green is the promise (Linux {release}, emulated)",
        fontsize=15,
        color=INK,
    )
    empty: Figures = {"contestants": {}}
    _bars(panels[0], report.get("churn", empty), _broken_percent, 100 * BROKEN_SHARE)
    panels[0].set_title("5. merges broken within 60 s, % of all", fontsize=11, color=INK)
    _bars(panels[1], report.get("idle", empty), _idle_percent, IDLE_PERCENT)
    panels[1].set_title("7. all has merged: CPU time, % of a core", fontsize=11, color=INK)
    panels[1].set_yscale("log")
    panels[1].yaxis.set_major_formatter("{x:g}")
    _bars(panels[2], report.get("server", empty), _p99_ms, None)
    panels[2].set_title("8. Redis: p99 of its responses, ms", fontsize=11, color=INK)
    figure.savefig(path)
    pyplot.close(figure)


def _bars(axes: Axes, found: Figures, value: Value, promise: float | None) -> None:
    heights = {name: value(one) for name, one in found["contestants"].items()}
    shown = {name: height for name, height in heights.items() if height is not None}
    for place, (name, height) in enumerate(shown.items()):
        axes.bar(place, height, 0.7, color=STYLES[name][0])
        axes.text(place, height, f"{height:.3g}", ha="center", va="bottom")
    if promise is not None:
        axes.axhline(promise, color=TARGET, linewidth=3)
    if not shown:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
    axes.set_xticks(range(len(shown)), [name.replace(" ", "\n", 1) for name in shown])
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _broken_percent(one: Figures) -> float | None:
    return 100 * float(one["breaks"]["share"]) if "breaks" in one else None


def _idle_percent(one: Figures) -> float | None:
    return float(one["idle_percent"]["median"]) if one.get("idle_percent") else None


def _p99_ms(one: Figures) -> float | None:
    return float(one["latency"]["p99_ms"]["median"]) if "latency" in one else None
