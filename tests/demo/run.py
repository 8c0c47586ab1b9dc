# SPDX-License-Identifier: MIT
"""The demo, on the host: boot, watch, draw, report, judge.

    python -m tests.demo.run

Leaves build/demo/report.json and build/demo/memory.png. Exit status 0 only if at least 90 % of the
census came back, nothing was wrong, and the kernel had no complaint.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tests.demo import catalogue, picture, report
from tests.vm.guest import Guest, GuestError
from tests.vm.steps import StepFailed, say, step

CHECKOUT = Path(__file__).parents[2]
DIRECTORY = CHECKOUT / "build" / "demo"
# From the checkout, where the guest's commands run as well.
POLICIES = ("deploy/policy.d/gunicorn.yaml", "tests/demo/budget.yaml")
TIME_LIMIT_SECONDS = 720


def prepare() -> None:
    """An empty directory, and what the shop must answer, computed here and not by the fleet."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for name in ("facts.json", "responses.log", "report.json", "memory.png"):
        (DIRECTORY / name).unlink(missing_ok=True)
    products = [catalogue.product(number) for number in range(catalogue.PRODUCTS)]
    (DIRECTORY / "report_answer").write_bytes(catalogue.report_answer(products))


def main() -> int:
    """0: as promised; 1: the demo fell short; else the guest's verdict."""
    started = time.monotonic()
    try:
        with step("prepare"):
            prepare()
        say("==> boot the newest supported kernel in a virtual machine, and run the demo in it")
        words = [sys.executable, "-m", "tests.demo.guest", str(DIRECTORY), *POLICIES]
        guest = Guest(kernel="newest")
        result = guest.run(words, time_limit_seconds=TIME_LIMIT_SECONDS)
        if result.status:
            result.check()
    except (GuestError, StepFailed) as failure:
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
        return getattr(failure, "exit_status", 1)

    with step("report and picture"):
        run = report.load_run(
            DIRECTORY,
            result.accelerator,
            time.monotonic() - started,
            result.kernel_log_findings,
        )
        figures = report.figures(run)
        text = json.dumps(figures, indent=2) + "\n"
        (DIRECTORY / "report.json").write_text(text, encoding="utf-8")
        picture.draw(run, figures, DIRECTORY / "memory.png")

    say(f"\n{report.table(figures)}\n")
    say(f"  picture  {(DIRECTORY / 'memory.png').relative_to(CHECKOUT)}")
    say(f"  figures  {(DIRECTORY / 'report.json').relative_to(CHECKOUT)}")
    shortfalls = report.failures(figures)
    for shortfall in shortfalls:
        say(f"  NOT GOOD ENOUGH: {shortfall}")
    if not shortfalls:
        say("  All as promised.")
    return 1 if shortfalls else 0


if __name__ == "__main__":
    sys.exit(main())
