# SPDX-License-Identifier: MIT
"""The fleet of prefork.py, with the same face as the other workloads."""

from __future__ import annotations

import subprocess
import sys

from tests.bench.race.workload import WorkloadError


class Fleet:
    """A master and its workers."""

    def __init__(self, products: int, opt_in: str) -> None:
        self._words = [sys.executable, "-m", "tests.bench.race.prefork", opt_in, str(products)]
        self.pids: tuple[int, ...] = ()

    def start(self, count: int) -> None:
        """Return when so many workers have served their requests."""
        self._master = subprocess.Popen(
            [*self._words, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        workers = self._answer().split()[1:]
        self.pids = (self._master.pid, *map(int, workers))

    def pause(self) -> None:
        """It is quiet by itself."""

    def verify(self) -> None:
        """Every worker computes a digest over all that it holds."""
        assert self._master.stdin
        self._master.stdin.write("verify\n")
        self._master.stdin.flush()
        if (answer := self._answer()) != "ok":
            raise WorkloadError(f"workers of the fleet hold wrong objects: {answer}")

    def stop(self) -> None:
        assert self._master.stdin
        self._master.stdin.close()
        if status := self._master.wait(timeout=60):
            raise WorkloadError(f"the fleet ended with {status}")

    def _answer(self) -> str:
        assert self._master.stdout
        line = self._master.stdout.readline()
        if not line:
            raise WorkloadError(f"the fleet has died: {self._master.wait(timeout=60)}")
        return line.strip()
