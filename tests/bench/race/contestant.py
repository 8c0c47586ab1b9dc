# SPDX-License-Identifier: MIT
"""What all contestants have in common, and the one that does nothing."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.race.cases import NOBODY


@dataclass(frozen=True)
class Cpu:
    """CPU time of a process so far, of all its threads, those that have ended among them."""

    ns: int
    user_ticks: int = 0
    system_ticks: int = 0


class Contestant:
    """Something that merges, between start() and stop(); this one never does."""

    name = NOBODY
    # How processes must ask KSM for it; see workload.c.
    opt_in = "none"
    pid = 0

    def start(self) -> dict[str, Any]:
        """Get it ready, before there is anything to merge; what that took."""
        return {}

    def cpu(self) -> Cpu:
        return cpu_of(self.pid) if self.pid else Cpu(0)

    def account(self) -> dict[str, Any]:
        """Its memory and its own counters, while the processes are still there."""
        return {}

    def stop(self) -> None:
        """As if it had never been, when the processes have ended."""


def cpu_of(pid: int) -> Cpu:
    """To the nanosecond by the clock of the process; by ticks for the parts."""
    # As clock_getcpuclockid() makes them: the scheduler's clock of a whole process.
    ns = time.clock_gettime_ns(~pid << 3 | 2)
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return Cpu(ns, int(fields[11]), int(fields[12]))


def ticks_per_second() -> int:
    """The unit of ticks."""
    return os.sysconf("SC_CLK_TCK")
