# SPDX-License-Identifier: MIT
"""What hints cost a storm of page faults, on every kernel: boot, measure, judge, write the table.

    make bench-hints                # or with KERNEL=6.12

The guest is emulated with one nanosecond an instruction: figures are the same on every machine,
however busy. Of a first touch, where the kernel zeroes a page, instructions make out less of the
time than of most code, so the ratio of times is smaller than the one told here. Leaves
build/bench/hints.json and build/bench/hints.md. A missed target is a finding, not a failure.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from tests.bench.each_kernel import DIRECTORY, each_kernel
from tests.bench.hints_guest import KINDS, STORM
from tests.vm.guest import Guest
from tests.vm.steps import run

SOURCE = Path(__file__).parent / "hints_storm.c"
TIME_LIMIT_SECONDS = 900
MOST_PERCENT = 3.0


def measure(kernel: str) -> dict[str, Any]:
    """One guest run."""
    directory = DIRECTORY / f"hints-{kernel}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    words = [sys.executable, "-m", "tests.bench.hints_guest", str(directory)]
    # One processor, or the others' instructions would be time as well.
    guest = Guest(kernel=kernel, accelerator="icount", cpus=1)
    result = guest.run(words, time_limit_seconds=TIME_LIMIT_SECONDS).check()
    facts = json.loads((directory / "facts.json").read_text(encoding="utf-8"))
    return {"release": result.release} | figures(facts)


def figures(facts: dict[str, Any]) -> dict[str, Any]:
    """Per fault and kind: the median of each case, and what a program adds to it in percent."""
    found: dict[str, Any] = {"lost": facts["lost"], "sampling": []}
    found["sampling"] = [turn["sampling"] for turn in facts["turns"]]
    for kind in KINDS:
        cases: dict[str, list[float]] = {}
        for turn in facts["turns"]:
            for case, rounds in turn[kind].items():
                cases.setdefault(case, []).extend(each / facts["pages"] for each in rounds)
        medians = {case: statistics.median(rounds) for case, rounds in cases.items()}
        percent = {
            case: 100 * (medians[case] / medians["nothing"] - 1) for case in ("empty", "hints")
        }
        found[kind] = {"instructions": medians, "percent": percent}
    return found


def markdown(report: dict[str, dict[str, Any]]) -> str:
    """One line for each kernel and kind."""
    lines = [
        "Instructions per fault, medians; sampling as the agent sets it.",
        "",
        "| kernel | fault | without | empty program | hints | empty | hints | promised |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kernel, found in report.items():
        for kind in KINDS:
            counts, percent = found[kind]["instructions"], found[kind]["percent"]
            verdict = "reached" if percent["hints"] <= MOST_PERCENT else "**missed**"
            lines.append(
                f"| {kernel} | {kind} | {counts['nothing']:,.0f} | {counts['empty']:,.0f} "
                f"| {counts['hints']:,.0f} | +{percent['empty']:.1f} % | +{percent['hints']:.1f} % "
                f"| at most {MOST_PERCENT:g} %: {verdict} |"
            )
    return "\n".join(lines) + "\n"


def build() -> None:
    """The program that takes the faults."""
    run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", STORM, SOURCE])


def main() -> int:
    """0, or the guest's verdict."""
    return each_kernel("hints", build, measure, markdown)


if __name__ == "__main__":
    sys.exit(main())
