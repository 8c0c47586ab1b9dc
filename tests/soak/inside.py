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
from pathlib import Path

import pytest

from tests.kernel.kernel_log import KernelLog
from tests.kernel.module import Module
from tests.kernel.wire import Client
from tests.soak import counters, leaks
from tests.soak.journal import Journal
from tests.vm.cache import CHECKOUT

JUDGES = CHECKOUT / "tests/judges/__main__.py"
# Made and turned on by the rig.
SWAP = "/dev/vda"
# A round that would be shorter than this is not begun.
LEAST_SECONDS = 20.0
# Beyond the time that a judge was told: its start and its own last look, under emulation.
JUDGE_GRACE_SECONDS = 240.0


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
        self.look_back(before)
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
        if not JUDGES.exists():
            return []
        words = [sys.executable, "-m", "tests.judges", "--list"]
        listed = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True)
        if listed.returncode:
            self.journal.write("broken", what=f"tests.judges --list: {listed.stderr[-500:]}")
            return []
        names = [line.split()[0] for line in listed.stdout.splitlines() if line.strip()]
        self.journal.write("judges", names=names)
        begun = {e["name"] for e in self.journal.of("judge-begin")}
        # Stressors are many and alike; if the time doesn't reach for all, let it be for some.
        names.sort(key=lambda name: name.startswith("stress"))
        return [name for name in names if name not in begun]

    def judges(self, names: Sequence[str]) -> None:
        """Each judge on its own, so that the journal knows which one lost the guest."""
        seconds = max(5.0, self.judges_seconds / max(1, len(names)) / 2)
        for name in names:
            if self.left_seconds < seconds:
                return
            if not self.module.loaded:
                self.module.load()
            self.journal.write("judge-begin", name=name)
            report = self.journal.path.with_name(f"judge-{name}.json")
            words = [sys.executable, "-m", "tests.judges", "--only", name]
            words += ["--seconds", f"{seconds:.0f}", "--json", str(report)]
            try:
                done = subprocess.run(words, cwd=CHECKOUT, timeout=seconds + JUDGE_GRACE_SECONDS)
                status: int | str = done.returncode
            except subprocess.TimeoutExpired:
                status = "still running long after its time"
            verdicts = json.loads(report.read_text())["judges"] if report.exists() else []
            self.journal.write("judge", name=name, status=status, verdicts=verdicts)

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
