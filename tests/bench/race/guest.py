# SPDX-License-Identifier: MIT
"""One case in the guest: every contestant in turn, round after round.

    python -m tests.bench.race.guest CASE DIRECTORY [--rounds N] [--contestants NAME…]

Leaves facts.json in the directory. Wrong bytes, a dead process or an agent that fails end it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.bench.race import cases, ksm
from tests.bench.race.cases import MAIN, NOBODY, Case
from tests.bench.race.contestant import Contestant, ticks_per_second
from tests.bench.race.race import Baseline, Run, wants_instruments
from tests.bench.race.service import SCRATCH, SERVICES, Agent, Service
from tests.demo import mergemem

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
STARTED = time.monotonic()


def contestant(name: str, agent: Agent) -> Contestant:
    """By its name."""
    if name == NOBODY:
        return Contestant()
    return Service(name, agent) if name in SERVICES else ksm.Ksm(name)


def order(case: Case, rounds: int, names: Sequence[str]) -> Iterator[tuple[int, str, bool]]:
    """Round, contestant, whether flushes are counted: alternately, another first each time."""
    main = [name for name in names if name in (*MAIN, NOBODY)]
    for number in range(rounds):
        turn = number % len(main) if main else 0
        for name in [*main[turn:], *main[:turn]]:
            yield number, name, False
        if number == 0:
            for name in names:
                if name not in main:
                    yield 0, name, False
    if case.counts_flushes:
        for name in main:
            if wants_instruments(name):
                yield rounds, name, True


def main() -> int:
    parser = argparse.ArgumentParser(description="one case of the race, in the guest")
    parser.add_argument("case")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--contestants", nargs="*")
    arguments = parser.parse_args()
    (case,) = cases.select(arguments.case)
    names = [name for name in arguments.contestants or case.contestants if ksm.is_there(name)]
    # Both contestants merge small pages; with huge ones the race would be about something else.
    HUGE_PAGES.write_text("madvise", encoding="ascii")
    mergemem.load_module()
    facts: dict[str, Any] = {
        "case": case.name,
        "release": os.uname().release,
        "ticks_per_second": ticks_per_second(),
        "runs": [],
    }
    baseline: Baseline | None = None
    agent = Agent()
    try:
        run = Run(case, contestant(NOBODY, agent), SCRATCH, None)
        facts["nobody"] = run.go()
        baseline = run.baseline
        tell(f"nobody: {baseline}")
        for number, name, instrumented in order(case, arguments.rounds or case.rounds, names):
            run = Run(case, contestant(name, agent), SCRATCH, baseline, instrumented)
            found = run.go() | {"round": number}
            if case.server:
                agent.stop()  # its sleep shall not be felt
            facts["runs"].append(found)
            tell(summary(found, baseline))
        agent.stop()
    finally:
        text = json.dumps(facts)
        (arguments.directory / "facts.json").write_text(text, encoding="utf-8")
        if (SCRATCH / "agent.log").exists():
            shutil.copy(SCRATCH / "agent.log", arguments.directory)
    return 0


def summary(found: dict[str, Any], baseline: Baseline | None) -> str:
    """A line for who is waiting."""
    last = found["samples"][-1]
    assert baseline
    saved = last["mappings"] - last["frames"] - baseline.shared_by_fork
    return (
        f"round {found['round']}, {found['contestant']}{', counting' * found['instrumented']}: "
        f"{saved / max(1, baseline.duplicates):.1%} of the census in "
        f"{last['at'] - found['ready']:.1f} s, {last['cpu_ns'] / 1e9:.2f} s CPU"
    )


def tell(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
