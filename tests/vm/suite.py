# SPDX-License-Identifier: MIT
"""Everything CI runs, stage by stage, and one line that sums it up.

A stage has failed when a test in it has, when one skipped for a reason that kernels.toml does not
account for, when it ran no test at all, or when its process or its guest ended badly. The figures
come from the JUnit files that each stage leaves in build/junit/.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.judges import provision as judges
from tests.vm import build, doctored, junit, kernels, lint, provision, tree, trixie
from tests.vm.cache import BUILD, CHECKOUT
from tests.vm.guest import Guest, GuestError
from tests.vm.kernels import Kernel, Skip, debug
from tests.vm.steps import StepFailed, say, step

REPORTS = BUILD / "junit"
UNIT = "tests/unit"
IN_GUEST = "tests/kernel"
# Emulated, a whole run of the guest tests; far above what it takes, far below CI's limit.
GUEST_SECONDS = 35 * 60
GUEST_MEMORY_MIB = 3072
# Tests of concurrency start all processors; with more than two, the others would take longer.
CPUS = 4
STARTED = ("maxcpus=2",)
GUEST_FAR_MEMORY_MIB = 512
# The debug kernel keeps books on each byte: what that takes more, of memory and of time.
DEBUG_TIMES = 2

# A stage gets the path of its report and returns what went wrong besides failed tests, if anything.
Stage = Callable[[Path], str]


@dataclass(frozen=True)
class Outcome:
    name: str
    seconds: float
    counts: junit.Counts
    skips: Sequence[Skip]
    problem: str


def run_stages(stages: dict[str, Stage]) -> int:
    """Run all stages, whatever some of them find, and print the sum."""
    outcomes = [_run_stage(name, stage) for name, stage in stages.items()]
    say("")
    for outcome in outcomes:
        problem = f"  <- {outcome.problem}" if outcome.problem else ""
        say(f"{outcome.name:26} {outcome.seconds:7.1f} s   {outcome.counts}{problem}")
        for reason, times in Counter(skip.reason for skip in outcome.skips).items():
            say(f"{'':26} {times:7} skipped: {reason}")
    total = sum((outcome.counts for outcome in outcomes), junit.Counts())
    say(f"\n{total}")
    return 1 if total.failed else 0


def _run_stage(name: str, stage: Stage) -> Outcome:
    report = REPORTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    report.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        with step(name):
            problem = stage(report)
    except (GuestError, StepFailed) as failure:
        say(f"{type(failure).__name__}: {failure}")
        problem = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
    counts, skips = junit.read(report), junit.skips(report)
    if not problem and not counts.ran:
        problem = "no test ran"
    if not problem:
        problem = unaccounted(skips, accepted_skips(name))
    # A stage that ended badly counts as a failure of its own: its tests may all have passed.
    if problem:
        counts += junit.Counts(failed=1)
    return Outcome(name, time.monotonic() - started, counts, skips, problem)


def accepted_skips(stage: str) -> tuple[Skip, ...]:
    kind, _, of = stage.partition("-")
    if kind == "kernel":
        return kernels.find(of).skips
    return kernels.unit_skips() if kind == "unit" else ()


def unaccounted(skips: Sequence[Skip], accepted: Sequence[Skip]) -> str:
    """What is wrong with skips, if anything is."""
    odd = [skip for skip in skips if not any(entry.accounts_for(skip) for entry in accepted)]
    if not odd:
        return ""
    tests = ", ".join(f"{skip.tests} ({skip.reason})" for skip in odd)
    return f"kernels.toml does not account for a skip: {tests}"


def everything(chosen: Sequence[Kernel]) -> dict[str, Stage]:
    return {
        "lint": _lint,
        **unit_stages(),
        "kmod": lambda report: _kmod(report, chosen),
        **guest_stages(chosen),
    }


def unit_stages() -> dict[str, Stage]:
    """Unit tests: newest libraries, Debian 12's, and Debian 13's with its Python."""
    return {
        "unit-newest": lambda report: _unit(provision.NEWEST, report),
        "unit-debian12": lambda report: _unit(provision.DEBIAN, report),
        "unit-debian13": _unit_in_trixie,
    }


def guest_stages(chosen: Sequence[Kernel], expression: str = "") -> dict[str, Stage]:
    """The tests that need root and the module, on each kernel."""
    return {
        f"kernel-{kernel.name}": lambda report, kernel=kernel: _in_guest(  # type: ignore[misc]
            kernel, report, expression
        )
        for kernel in chosen
    }


def _lint(report: Path) -> str:
    lint.run(report)
    return ""


def _kmod(report: Path, chosen: Sequence[Kernel]) -> str:
    cases: list[tuple[str, float, str | None]] = []
    for kernel in chosen:
        started = time.monotonic()
        problem = None
        try:
            build.module(tree.get(kernel))
        except StepFailed as failure:
            problem = str(failure)
            say(problem)
        cases.append(
            (f"builds without a warning for {kernel.name}", time.monotonic() - started, problem)
        )
    started = time.monotonic()
    problem = doctored.unnamed(tree.get(kernels.find("newest"))) or None
    cases.append(("names what a newer kernel lacks", time.monotonic() - started, problem))
    junit.write(report, "kmod", cases)
    return ""


def _unit(environment: Path, report: Path) -> str:
    words = [str(environment / "bin/python"), *_pytest(UNIT, report)]
    done = subprocess.run(words, cwd=CHECKOUT, env=os.environ | _environment())
    return _status(done.returncode, report)


def _unit_in_trixie(report: Path) -> str:
    inside = Path("/mnt") / report.relative_to(CHECKOUT)
    settings = [f"{name}={value}" for name, value in _environment().items()]
    words = trixie.command(
        ["env", *settings, "python3", *_pytest(UNIT, inside)],
        mounts={"/mnt": CHECKOUT, "/opt": provision.tools()},
    )
    return _status(subprocess.run(words).returncode, report)


def _in_guest(kernel: Kernel, report: Path, expression: str) -> str:
    build.helpers()
    judges.prepare()
    times = DEBUG_TIMES if kernel == debug() else 1
    guest = Guest(
        kernel=kernel,
        cpus=CPUS,
        kernel_parameters=STARTED,
        memory_mib=GUEST_MEMORY_MIB * times,
        far_memory_mib=GUEST_FAR_MEMORY_MIB,
    )
    words = [str(provision.NEWEST / "bin/python"), *_pytest(IN_GUEST, report), "--durations=10"]
    if expression:
        words += ["-k", expression]
    path = f"{provision.tools()}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    command = ["env", f"PATH={path}", *words]
    result = guest.run(command, env=_environment(), time_limit_seconds=GUEST_SECONDS * times)
    if result.kernel_log_findings:
        result.check()
    say(f"kernel {result.release}, {result.accelerator}: the kernel log is clean")
    return _status(result.status, report)


def _pytest(tests: str, report: Path) -> list[str]:
    # No cache directory: the tree may be shared with a guest, or owned by another user.
    return ["-m", "pytest", tests, "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]


def _environment() -> dict[str, str]:
    return {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}


def _status(status: int, report: Path) -> str:
    """pytest exits with 1 for failed tests, which the report has; the rest is a problem."""
    if status == 0 or (status == 1 and junit.read(report).failed):
        return ""
    return f"pytest ended with status {status}"
