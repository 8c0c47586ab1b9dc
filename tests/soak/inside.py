# SPDX-License-Identifier: MIT
"""What of the soak runs in the guest: suite, judges, suite again, and what is left over."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.judges import __main__ as judging
from tests.judges import catalogue
from tests.kernel.kernel_log import KernelLog
from tests.kernel.module import Module
from tests.kernel.wire import Client
from tests.soak import counters, enclosure, leaks
from tests.soak.journal import Journal
from tests.vm.cache import CHECKOUT

# Made and turned on by the rig.
SWAP = "/dev/vda"
# A round that would be shorter than this is not begun.
LEAST_SECONDS = 20.0
# How long a judge is let run beyond the time that it was told, before it is cut off, and how much
# time must be left for it to be begun. Databases and languages finish a unit of work first, which
# takes minutes on an emulated debug kernel.
GRACE_SECONDS = {"stress": 240.0, "": 600.0}
USUAL_SECONDS = {"stress": 30.0, "": 240.0}


class Soak:
    """One guest's share of the soak."""

    def __init__(
        self, journal: Journal, seconds: float, judges_seconds: float, in_process: bool = False
    ) -> None:
        self.journal = journal
        self.end = time.monotonic() + seconds
        self.judges_seconds = judges_seconds
        self.in_process = in_process
        self.module = Module()

    @property
    def left_seconds(self) -> float:
        return self.end - time.monotonic()

    def run(self, tests: str) -> None:
        """All of it; or one round of these tests alone."""
        self.journal.write("guest", release=platform.release(), cpus=os.cpu_count())
        # The tests count each page; the judges like it rough.
        subprocess.run(["swapoff", "-a"], check=True)
        before = counters.read()
        log = KernelLog()
        if tests:
            self.suite(1, self.left_seconds, tests)
        else:
            self.rounds()
        failed = any(e["outcome"] == "failed" for e in self.journal.of("test"))
        scans = os.environ["MERGEMEM_KERNEL"] == "debug" and not (failed or log.complaints())
        # They take minutes. A planted bug that has been noticed needs no other witness.
        if scans or not tests:
            self.look_back(before)
        elif self.module.loaded:
            with suppress(subprocess.CalledProcessError):
                self.module.unload()
        self.journal.write("log", findings=log.complaints())
        log.close()

    def rounds(self) -> None:
        """The suite, the judges, and the suite again until the time is up."""
        waiting = self.waiting_judges()
        self.suite(1, self.left_seconds - (self.judges_seconds if waiting else 0))
        subprocess.run(["swapon", SWAP], check=True)
        self.judges(waiting)
        subprocess.run(["swapoff", SWAP], check=True)
        number = 1
        while self.left_seconds > LEAST_SECONDS:
            if self.suite(number, self.left_seconds):
                number += 1

    def suite(self, number: int, seconds: float, tests: str = "tests/kernel") -> bool:
        """A round of the module's tests, as far as the time goes; whether it is complete."""
        if seconds < LEAST_SECONDS:
            return False
        os.environ |= {
            "MERGEMEM_SOAK_JOURNAL": str(self.journal.path),
            "MERGEMEM_SOAK_ROUND": str(number),
            "MERGEMEM_SOAK_SECONDS": str(seconds),
        }
        words = [tests, "-q", "-p", "tests.soak.plugin"]
        words += ["-p", "no:cacheprovider", "-o", "enable_assertion_pass_hook=true"]
        status = self._pytest(words)
        # 5: no test is left to run. From 2 on something is wrong with the suite itself.
        if status not in (0, 1, 5):
            self.journal.write("broken", what=f"pytest ended with status {status}")
            self.end = 0
        collected = [e["tests"] for e in self.journal.of("collected") if e["round"] == number]
        begun = {e["id"] for e in self.journal.of("begin") if e["round"] == number}
        return bool(collected) and begun >= set(collected[-1])

    def _pytest(self, words: list[str]) -> int:
        if self.in_process:
            # Starting takes longer than the test, in a guest like this.
            return int(pytest.main(words))
        command = [sys.executable, "-m", "pytest", *words]
        return subprocess.run(command, cwd=CHECKOUT).returncode

    def waiting_judges(self) -> list[str]:
        """The judges that no guest of this soak has begun with."""
        names = [judge.name for judge in catalogue.JUDGES]
        self.journal.write("judges", names=names)
        begun = {e["name"] for e in self.journal.of("judge-begin")}
        # The short ones first, since time may not be enough for all; the databases last.
        names.sort(key=lambda name: (not name.startswith("stress"), not name.startswith("cpython")))
        return [name for name in names if name not in begun]

    def judges(self, names: Sequence[str]) -> None:
        """Each judge on its own, so that the journal knows which one lost the guest."""
        end = min(self.end, time.monotonic() + self.judges_seconds)
        seconds = max(5.0, self.judges_seconds / max(1, len(names)) / 2)
        for name in names:
            if time.monotonic() + seconds + of_kind(USUAL_SECONDS, name) > end:
                continue
            if not self.module.loaded:
                self.module.load()
            self.judge(name, seconds, seconds + of_kind(GRACE_SECONDS, name))

    def judge(self, name: str, seconds: float, limit_seconds: float) -> None:
        """Run one, and let nothing of it outlive its time."""
        self.journal.write("judge-begin", name=name)
        report = self.journal.path.with_name(f"judge-{name}.json")
        words = ["--only", name, "--seconds", f"{seconds:.0f}", "--json", str(report)]
        status: int | str | None
        began = time.monotonic()
        try:
            status = enclosure.run(lambda: judging.main(words), limit_seconds)
        except enclosure.Undying as undying:
            status = f"it does not end when it is killed:\n{undying}"
        self.journal.write(
            "judge",
            name=name,
            status=status,
            seconds=round(time.monotonic() - began, 1),
            verdicts=json.loads(report.read_text())["judges"] if report.exists() else [],
        )

    def look_back(self, before: dict[str, int]) -> None:
        """What is left: first as the module says, then, without it, as the kernel says."""
        if not self.module.loaded:
            self.module.load()
        with Client() as client:
            info = client.info()
        symbols = leaks.Symbols.read()
        self.module.unload()
        after, astray = counters.settled(before)
        if info.shared_pages or info.shared_mappings:
            astray["shared pages"] = f"{info.shared_pages}, {info.shared_mappings} mappings"
        self.journal.write("counters", before=before, after=after, astray=astray)
        self.journal.write("page_owner", leaks=leaks.owned_pages(symbols))
        self.journal.write("kmemleak", leaks=leaks.unreferenced_objects(symbols))


def of_kind(table: dict[str, float], name: str) -> float:
    """A judge's entry: that of the beginning of its name, else the one for all others."""
    return table.get(name.partition("-")[0], table[""])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.soak.inside", description=__doc__)
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--judges-seconds", type=float, default=0)
    parser.add_argument(
        "--plants",
        nargs="*",
        default=[],
        help="modules with their tests, as PATH=TESTS, to be met one after another",
    )
    chosen = parser.parse_args()
    for plant in chosen.plants:
        module, _, tests = plant.partition("=")
        os.environ["MERGEMEM_KO"] = module
        Soak(Journal(Path(module).with_name("journal.jsonl")), 3600, 0, True).run(tests)
    if chosen.plants:
        return 0
    Soak(Journal(chosen.journal), chosen.seconds, chosen.judges_seconds).run("")
    return 0


if __name__ == "__main__":
    sys.exit(main())
