# SPDX-License-Identifier: MIT
"""make bench: a guest for each case and kernel, one after the other; then the report.

    python -m tests.bench.race [KERNEL…]      # CASE=, ROUNDS= in the environment

CONTESTANTS="mergemem;ksmd flat out" limits who takes part, for trying things out.

Leaves build/bench/report.json with what was measured now and, for other cases and kernels, before;
build/bench/race-*.png; and the tables in docs/benchmarks.md. A missed target is a finding, not a
failure. Wrong bytes, a process that died, or a complaint in the kernel log is one.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from typing import Any

from tests.bench.race import cases, report, workload
from tests.bench.race.cases import Case
from tests.judges import provision as judges
from tests.vm import kernels
from tests.vm.cache import BUILD
from tests.vm.guest import Guest, GuestError
from tests.vm.steps import StepFailed, step

DIRECTORY = BUILD / "bench"
TIME_LIMIT_SECONDS = 1500
MEMORY_MIB = 2048
# Or KSM's objects would share slabs with others of their size, and could not be told apart.
KERNEL_PARAMETERS = ("slab_nomerge",)


def measure(case: Case, kernel: str) -> dict[str, Any]:
    """One guest run; what it wrote down."""
    directory = DIRECTORY / f"race-{case.name}-{kernel}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    words = [sys.executable, "-m", "tests.bench.race.guest", case.name, str(directory)]
    if rounds := os.environ.get("ROUNDS"):
        words += ["--rounds", rounds]
    if contestants := os.environ.get("CONTESTANTS"):
        words += ["--contestants", *contestants.split(";")]
    guest = Guest(kernel=kernel, memory_mib=MEMORY_MIB, kernel_parameters=KERNEL_PARAMETERS)
    started = time.monotonic()
    result = guest.run(words, time_limit_seconds=TIME_LIMIT_SECONDS).check()
    # Of the last minute: what else the processors of the host had to do, all guests included.
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    facts: dict[str, Any] = json.loads((directory / "facts.json").read_text(encoding="utf-8"))
    facts["accelerator"], facts["host_load"] = result.accelerator, load
    facts["guest_seconds"] = time.monotonic() - started
    return facts


def main() -> int:
    """0, or the guest's verdict."""
    chosen = [kernel.name for kernel in kernels.select(kernels.load(), " ".join(sys.argv[1:]))]
    try:
        wanted = cases.select(os.environ.get("CASE", ""))
        workload.build()
        if any(case.server for case in wanted):
            judges.prepare()
        for kernel in chosen:
            for case in wanted:
                with step(f"kernel {kernel}: case {case.number}, {case.title}"):
                    facts = measure(case, kernel)
                # After each, or an hour's work would go with the last one's failure.
                found = report.load(DIRECTORY / "report.json")
                report.merge(found, kernel, case, facts)
                report.save(found, DIRECTORY)
        with step("tables and pictures"):
            report.write(found, DIRECTORY)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (GuestError, StepFailed) as failure:
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
        return getattr(failure, "exit_status", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
