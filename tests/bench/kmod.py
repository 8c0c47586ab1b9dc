# SPDX-License-Identifier: MIT
"""The cost of one merge against KSM, on every kernel: boot, measure, judge, write the table.

    make bench-kmod                 # or with KERNEL=6.12

Each kernel is booted twice: as the tests do it, for times; and emulated with one nanosecond an
instruction, for figures that are the same on every machine, however busy. Leaves
build/bench/kmod.json and build/bench/kmod.md. A missed target is a finding, not a failure.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.bench import table
from tests.bench.figures import figures
from tests.bench.replay import PROGRAM
from tests.vm import kernels
from tests.vm.cache import BUILD, CHECKOUT
from tests.vm.guest import Guest, GuestError
from tests.vm.steps import StepFailed, run, say, step

DIRECTORY = BUILD / "bench"
SOURCE = Path(__file__).parent / "replay.c"
TIME_LIMIT_SECONDS = 900
# Counts instructions as time; one processor, or the others' instructions would be time as well.
INSTRUCTIONS = "icount"


def build_replay() -> None:
    """The program that sends requests; static, since it is small."""
    run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", PROGRAM, SOURCE])


def measure(kernel: str, accelerator: str | None) -> dict[str, Any]:
    """One guest run."""
    directory = DIRECTORY / f"kmod-{kernel}{f'-{accelerator}' if accelerator else ''}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    words = [sys.executable, "-m", "tests.bench.kmod_guest", str(directory)]
    cpus = 1 if accelerator == INSTRUCTIONS else 2
    guest = Guest(kernel=kernel, accelerator=accelerator, cpus=cpus)
    result = guest.run(words, time_limit_seconds=TIME_LIMIT_SECONDS).check()
    # Of the last minute: what else the processors of the host had to do, all guests included.
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    facts = json.loads((directory / "facts.json").read_text(encoding="utf-8"))
    told = {"release": result.release, "accelerator": result.accelerator, "host_load": load}
    return told | figures(directory, facts)


def main() -> int:
    """0, or the guest's verdict."""
    chosen = [kernel.name for kernel in kernels.select(kernels.load(), " ".join(sys.argv[1:]))]
    report: dict[str, Any] = {}
    try:
        build_replay()
        for name in chosen:
            with step(f"kernel {name}: times"):
                times = measure(name, None)
            with step(f"kernel {name}: instructions"):
                instructions = measure(name, INSTRUCTIONS)
            report[name] = {"times": times, "instructions": instructions}
    except (GuestError, StepFailed) as failure:
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
        return getattr(failure, "exit_status", 1)
    markdown = table.markdown(report)
    (DIRECTORY / "kmod.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (DIRECTORY / "kmod.md").write_text(markdown, encoding="utf-8")
    say(f"\n{markdown}")
    say(f"figures  {(DIRECTORY / 'kmod.json').relative_to(CHECKOUT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
