# SPDX-License-Identifier: MIT
"""A benchmark that is one guest for each kernel, and a table of all of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from tests.vm import kernels
from tests.vm.cache import BUILD, CHECKOUT
from tests.vm.guest import GuestError
from tests.vm.steps import StepFailed, say, step

DIRECTORY = BUILD / "bench"
Report = dict[str, dict[str, Any]]


def each_kernel(
    name: str,
    build: Callable[[], None],
    measure: Callable[[str], dict[str, Any]],
    markdown: Callable[[Report], str],
) -> int:
    """Measure on the kernels of the command line; leave NAME.json and NAME.md in build/bench.

    Returns 0, or the guest's verdict.
    """
    chosen = [kernel.name for kernel in kernels.select(kernels.load(), " ".join(sys.argv[1:]))]
    report: Report = {}
    try:
        build()
        for kernel in chosen:
            with step(f"kernel {kernel}"):
                report[kernel] = measure(kernel)
    except (GuestError, StepFailed) as failure:
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
        return getattr(failure, "exit_status", 1)
    figures = DIRECTORY / f"{name}.json"
    figures.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    figures.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    say(f"\n{markdown(report)}")
    say(f"figures  {figures.relative_to(CHECKOUT)}")
    return 0
