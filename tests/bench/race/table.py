# SPDX-License-Identifier: MIT
"""The race as Markdown: verdicts first, then the figures of each case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.race.cases import CASES, MERGEMEM, NOBODY, Case
from tests.bench.race.figures import Figures
from tests.bench.race.targets import METADATA_BYTES, verdicts

BEGIN, END = "<!-- race: begin; written by make bench -->", "<!-- race: end -->"
MIB = float(1 << 20)
NOT_REACHED = "not reached"
Report = dict[str, dict[str, Figures]]  # by kernel, by case


@dataclass(frozen=True)
class Column:
    """One figure of every contestant."""

    title: str
    key: str
    scale: float = 1.0
    # For a figure that is missing because it was never reached.
    missing: str = ""


COLUMNS = (
    Column("census reached", "share", 0.01),
    Column("s to 95 %", "seconds_to_95", missing=NOT_REACHED),
    Column("CPU s to 95 %", "cpu_seconds_to_95", missing=NOT_REACHED),
    Column("CPU s per GiB, to 95 %", "cpu_per_gib_to_95", missing=NOT_REACHED),
    Column("CPU s, window", "window_cpu_seconds"),
    Column("CPU s per GiB, window", "window_cpu_per_gib", missing="nothing saved"),
    Column("in the kernel", "system_share", 0.01),
    Column("metadata, B/page", "metadata_bytes_per_page"),
    Column("scanner, MiB", "scanner_bytes", MIB),
    Column("saved, net, MiB", "net_saved_bytes", MIB),
    Column("interrupts: TLB", "interrupts"),
    Column("all calls", "function_calls"),
)


def markdown(report: Report, index_bytes_per_page: float) -> str:
    """All tables; `report` has figures by kernel and case."""
    parts = [_where(report), _verdicts(report, index_bytes_per_page)]
    for case in CASES:
        found = {kernel: cases[case.name] for kernel, cases in report.items() if case.name in cases}
        if found:
            parts += [f"### Case {case.number}: {case.title}", _case(case, found)]
    return "\n\n".join(parts) + "\n"


def rewrite(path: Path, text: str) -> None:
    """Put it between the markers of a document."""
    document = path.read_text(encoding="utf-8")
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path}: the lines {BEGIN} and {END} are missing")
    path.write_text(f"{before}{begin}\n{text}{end}{after}", encoding="utf-8")


def _where(report: Report) -> str:
    lines = []
    for kernel, cases in report.items():
        first = next(iter(cases.values()))
        loads = [found["host_load"] for found in cases.values()]
        minutes = sum(found["guest_seconds"] for found in cases.values()) / 60
        how = "emulated" if first["accelerator"] == "tcg" else first["accelerator"]
        lines.append(
            f"* {kernel}: Linux {first['release']}, {how}, load {min(loads):.1f} to "
            f"{max(loads):.1f} of the host, {minutes:.0f} minutes"
        )
    return "\n".join(lines)


def _verdicts(report: Report, index_bytes_per_page: float) -> str:
    rows = []
    for case in CASES:
        for number, target in enumerate(verdicts(case.name, {"contestants": {}})):
            cells = [str(case.number), target.target.name, target.target.promise]
            for cases in report.values():
                if case.name not in cases:
                    cells.append("")
                    continue
                verdict = verdicts(case.name, cases[case.name])[number]
                value = "no figure" if verdict.value is None else f"{verdict.value:.3g}"
                cells.append(f"{value} {'reached' if verdict.reached else '**missed**'}")
            rows.append(cells)
    word = "reached" if index_bytes_per_page <= METADATA_BYTES else "**missed**"
    name = "agent's memory per page scanned, at its peak, 2 million pages; bytes"
    same = [f"{index_bytes_per_page:.2f} {word}"] * len(report)
    rows.append(["all", name, f"at most {METADATA_BYTES:g}", *same])
    return _table(["case", "target", "promise", *report], rows)


def _case(case: Case, found: dict[str, Figures]) -> str:
    rows = []
    columns = [column for column in COLUMNS if _anybody_has(found, column.key)]
    extra = _extra(found)
    for kernel, figures in found.items():
        for name, one in figures["contestants"].items():
            cells = [kernel, name]
            for column in columns:
                cells.append("" if name == NOBODY else _spread(one.get(column.key), column))
            rows.append([*cells, *(tell(one) for _, tell in extra)])
    header = ["kernel", "contestant", *(c.title for c in columns), *(title for title, _ in extra)]
    first = next(iter(found.values()))
    census = first["census_bytes"] / MIB
    text = f"Census: {census:,.1f} MiB. Window: {first['window_seconds']:.0f} s."
    starts = [
        f"{kernel}: {figures['contestants'][MERGEMEM]['start_cpu_seconds']:.1f} s"
        for kernel, figures in found.items()
        if MERGEMEM in figures["contestants"]
    ]
    if starts:
        text += f" The agent's start, once, not in these figures: CPU {', '.join(starts)}."
    return f"{text}\n\n{_table(header, rows)}"


def _extra(found: dict[str, Figures]) -> list[tuple[str, Callable[[Figures], str]]]:
    """Columns of figures that only some cases have."""
    columns: list[tuple[str, Callable[[Figures], str]]] = [
        ("flushes per page", lambda one: _plain(one.get("flushes_per_page"), "{:.3f}")),
        (
            "merges, broken within 60 s",
            lambda one: (
                f"{one['breaks']['merged']:,}, {one['breaks']['broken']:,} "
                f"({one['breaks']['share']:.1%})"
                if "breaks" in one
                else ""
            ),
        ),
        ("core when idle, %", lambda one: _spread(one.get("idle_percent"), Column("", ""))),
        ("server p50, ms", lambda one: _latency(one, "p50_ms")),
        ("p99, ms", lambda one: _latency(one, "p99_ms")),
        ("requests/s", lambda one: _latency(one, "requests_per_second")),
    ]
    contestants = [one for figures in found.values() for one in figures["contestants"].values()]
    return [(title, tell) for title, tell in columns if any(tell(one) for one in contestants)]


def _anybody_has(found: dict[str, Figures], key: str) -> bool:
    return any(
        one.get(key) is not None
        for figures in found.values()
        for one in figures["contestants"].values()
    )


def _latency(one: Figures, key: str) -> str:
    return _spread(one["latency"][key], Column("", "")) if "latency" in one else ""


def _plain(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _spread(found: dict[str, float] | None, column: Column) -> str:
    """The median, and the rounds' lowest and highest where they differ."""
    if found is None:
        return column.missing
    middle, low, high = (
        _number(found[key] / column.scale) for key in ("median", "lowest", "highest")
    )
    unit = " %" if column.scale == 0.01 else ""
    return f"{middle}{unit}" if low == high else f"{middle}{unit} ({low} to {high})"


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
