# SPDX-License-Identifier: MIT
"""Processes of workload.c: started together or one by one, verified by themselves."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.vm.steps import run

PROGRAM = Path(__file__).parents[3] / "build" / "race-workload"
# When all processes have been told to pause, none has been beyond this.
AHEAD_MS = 1000
SOURCE = Path(__file__).with_name("workload.c")


def build() -> None:
    """The program; static, so that there is little in its processes but what is told."""
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-static"]
    run(["gcc", *flags, "-o", PROGRAM, SOURCE])


class WorkloadError(Exception):
    """A process has died, or has found wrong bytes in its memory."""


@dataclass
class Worker:
    """One process."""

    process: subprocess.Popen[str]
    pages: int
    address: int = 0

    @classmethod
    def start(cls, kind: str, number: int, pages: int, opt_in: str) -> Worker:
        """Start it; wait() says when its memory is filled."""
        words = [str(PROGRAM), kind, str(number), str(pages), opt_in]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return cls(process, pages)

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self) -> None:
        """Until it has filled its memory."""
        self.address = int(self._answer().removeprefix("ready "))

    def ask(self, what: str) -> None:
        """Give an order; its answer must be that all is well."""
        self.send(what)
        self.expect_ok()

    def send(self, what: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()

    def expect_ok(self) -> None:
        if (answer := self._answer()) != "ok":
            raise WorkloadError(f"process {self.pid} has wrong pages: {answer}")

    def stop(self) -> None:
        """End it; it must have lived until now."""
        if self.process.poll() is not None:
            raise WorkloadError(f"process {self.pid} has died: {self.process.returncode}")
        assert self.process.stdin
        self.process.stdin.close()
        if status := self.process.wait(timeout=60):
            raise WorkloadError(f"process {self.pid} ended with {status}")

    def _answer(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise WorkloadError(f"process {self.pid} has died: {self.process.wait(timeout=60)}")
        return line.strip()


class Workload:
    """All processes of a case."""

    def __init__(self, kind: str, pages_each: int, opt_in: str) -> None:
        self.kind, self.pages_each, self.opt_in = kind, pages_each, opt_in
        self.workers: list[Worker] = []

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(worker.pid for worker in self.workers)

    def start(self, count: int) -> None:
        """Start so many more; return when the memory of all is filled."""
        first = len(self.workers)
        numbers = range(first, first + count)
        fresh = [Worker.start(self.kind, n, self.pages_each, self.opt_in) for n in numbers]
        for worker in fresh:
            worker.wait()
        self.workers += fresh

    def pause(self) -> None:
        """No more writes, and what is equal in all processes in step is equal in all now."""
        self._ask_all(
            f"pause {time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000_000 + AHEAD_MS}"
        )

    def verify(self) -> None:
        """Have every process compare every page with what it must hold."""
        self._ask_all("verify")

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()

    def _ask_all(self, what: str) -> None:
        for worker in self.workers:
            worker.send(what)
        for worker in self.workers:
            worker.expect_ok()


def launcher(opt_in: str) -> Sequence[str | Path]:
    """Words in front of a program's own that opt it in."""
    return [PROGRAM, "exec", opt_in]
