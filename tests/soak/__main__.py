# SPDX-License-Identifier: MIT
"""`make soak`: the suite and the judges on the debug kernel, and build/soak/report.json."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path

from tests.soak import report
from tests.soak.journal import Journal
from tests.soak.report import Boot
from tests.vm import build, kernels, provision, suite, tree
from tests.vm.cache import BUILD
from tests.vm.guest import Guest, GuestError, GuestLost
from tests.vm.steps import say, step

HOME = BUILD / "soak"
CPUS = 4
# KASAN's shadow, page_owner and kmemleak take a third of it.
MEMORY_MIB = 6144
# For the judges; the tests bring their own.
SWAP_MIB = 512
# What a guest needs beside its time: its boot, the test that is under way, the search for leaks.
SLACK_SECONDS = 900
# A guest that dies is followed by another one, which goes on behind the test that it died of.
MOST_GUESTS = 6
JUDGES_SHARE = 0.35
LEAST_SECONDS = 60.0
EXCERPT_LINES = 60


def guest() -> Guest:
    """The machine that the soak runs on."""
    return Guest(
        kernel=kernels.debug(),
        cpus=CPUS,
        memory_mib=MEMORY_MIB,
        far_memory_mib=suite.GUEST_FAR_MEMORY_MIB,
        swap_mib=SWAP_MIB,
        # More processors than the host has wait for each other most of the time; tests that need
        # them all start them.
        kernel_parameters=() if (os.cpu_count() or 1) >= CPUS else suite.STARTED,
    )


def soak(seconds: float, journal: Journal) -> list[Boot]:
    """Guests, one after another, until the time is up or one has got to its end."""
    boots: list[Boot] = []
    end = time.monotonic() + seconds
    while len(boots) < MOST_GUESTS and (left := end - time.monotonic()) > LEAST_SECONDS:
        with step(f"soak: guest {len(boots) + 1}, {left / 60:.0f} minutes left"):
            boots.append(_boot(journal, left, JUDGES_SHARE * seconds))
        say(report_line(boots[-1]))
        if not boots[-1].lost:
            break
    return boots


def report_line(boot: Boot) -> str:
    """One guest's fate."""
    findings = f"{len(boot.findings)} findings in its log"
    return f"guest {'LOST: ' + boot.lost if boot.lost else 'ended well'}; {findings}"


def _boot(journal: Journal, seconds: float, judges_seconds: float) -> Boot:
    words = [str(provision.NEWEST / "bin/python"), "-m", "tests.soak.inside"]
    words += ["--journal", str(journal.path), "--seconds", f"{seconds:.0f}"]
    words += ["--judges-seconds", f"{judges_seconds:.0f}"]
    path = f"{provision.tools()}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    environment = {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    try:
        result = guest().run(words, env=environment, time_limit_seconds=seconds + SLACK_SECONDS)
    except GuestError as verdict:
        text = str(verdict)
        found = [x.removeprefix("kernel log: ") for x in text.splitlines() if "kernel log:" in x]
        kind = "lost" if isinstance(verdict, GuestLost) else "stopped at its time limit"
        return Boot(time.monotonic() - started, tuple(found), text, kind)
    lost = f"its command ended with status {result.status}" if result.status else ""
    excerpt = _excerpt(result.kernel_log, result.kernel_log_findings)
    return Boot(result.duration_seconds, result.kernel_log_findings, excerpt, lost)


def _excerpt(log: str, findings: tuple[str, ...]) -> str:
    """The log from its first finding on."""
    lines = log.splitlines()
    for number, line in enumerate(lines):
        if any(finding in line for finding in findings):
            return "\n".join(lines[max(0, number - 3) : number + EXCERPT_LINES])
    return ""


def prepare() -> None:
    """What a guest cannot make for itself."""
    provision.packages()
    provision.environments()
    build.module(tree.get(kernels.debug()))
    build.helpers()
    if importlib.util.find_spec("tests.judges.provision"):
        from tests.judges import provision as judges

        judges.prepare()
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.soak", description=__doc__)
    default = float(os.environ.get("SOAK_MINUTES") or 20)
    parser.add_argument("--minutes", type=float, default=default, help="of tests; default 20")
    minutes = parser.parse_args().minutes
    with step("soak: prepare"):
        prepare()
    journal = Journal(HOME / "journal.jsonl")
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    boots = soak(minutes * 60, journal)
    settings = {"started": started, "wanted_seconds": minutes * 60}
    settings |= {"cpus": CPUS, "memory_mib": MEMORY_MIB}
    made = report.make(journal, boots, settings)
    target: Path = HOME / "report.json"
    target.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    say(f"\n{report.summary(made)}\n{target}")
    return 0 if made["clean"] else 1


if __name__ == "__main__":
    sys.exit(main())
