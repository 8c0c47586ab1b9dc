# SPDX-License-Identifier: MIT
"""Pressure: how short the host is of memory and of CPU time, and what budget that calls for.

The kernel's pressure stall information (Documentation/accounting/psi.rst) says what share of the
last ten seconds some task has waited for a resource. While that is above a threshold for memory,
pages are worth more than the CPU time that it takes to free them, and the budget rises; while it is
above one for CPU, it falls. CPU goes first: a host that waits for its processors must not wait
longer for ours, and one that waits for memory only has processors to spare.

A level is left when the figure has fallen to half its threshold, so that the budget does not swing
with what it has itself brought about.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mergemem_agent.policy import AgentSettings

log = logging.getLogger(__name__)

# The kernel brings its averages up to date every two seconds.
LOOK_SECONDS: Final = 2.0
_LEAVE_SHARE: Final = 0.5


class Level(enum.Enum):
    """What the host is short of."""

    NONE = "none"
    MEMORY = "memory"
    CPU = "cpu"


@dataclass(frozen=True)
class PressureState:
    """The last look: percents of ten seconds in which some task waited; None: not known."""

    level: Level = Level.NONE
    memory_percent: float | None = None
    cpu_percent: float | None = None


class Pressure:
    """Looks at /proc/pressure now and then, and says what budget is due."""

    def __init__(
        self,
        settings: AgentSettings,
        root: Path = Path("/proc/pressure"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the thresholds and budgets of `settings`; know nothing before the first look."""
        self._settings = settings
        self._root = root
        self._clock = clock
        self._looked = -float("inf")
        self._told = False
        self.state = PressureState()

    def change_settings(self, settings: AgentSettings) -> None:
        """Go on with other thresholds and budgets; the next budget_percent() looks anew."""
        self._settings = settings
        self._looked = -float("inf")

    def budget_percent(self) -> float:
        """Return what the agent may take of one CPU now; looks again if it is time for that."""
        now = self._clock()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._look()
        settings = self._settings
        return {
            Level.NONE: settings.budget_percent,
            Level.MEMORY: settings.memory_pressure_budget_percent,
            Level.CPU: settings.cpu_pressure_budget_percent,
        }[self.state.level]

    def _look(self) -> None:
        memory, cpu = self._read("memory"), self._read("cpu")
        settings, level = self._settings, Level.NONE
        if self._above(Level.MEMORY, memory, settings.memory_pressure_percent):
            level = Level.MEMORY
        if self._above(Level.CPU, cpu, settings.cpu_pressure_percent):
            level = Level.CPU
        if level is not self.state.level:
            log.info(
                "budget: pressure is now %s (memory %s, cpu %s)",
                level.value, _percent(memory), _percent(cpu),
            )  # fmt: skip
        self.state = PressureState(level, memory, cpu)

    def _above(self, level: Level, percent: float | None, threshold_percent: float) -> bool:
        if percent is None:
            return False
        if self.state.level is level:
            return percent > threshold_percent * _LEAVE_SHARE
        return percent > threshold_percent

    def _read(self, resource: str) -> float | None:
        """Return the percent of "some avg10=0.42 ...", or None where the kernel does not tell."""
        try:
            first = (self._root / resource).read_text(encoding="ascii").split()
            if first[0] != "some":
                raise ValueError(first[0])
            return float(first[1].removeprefix("avg10="))
        except (OSError, ValueError, IndexError) as failure:
            if not self._told:
                self._told = True
                log.info("budget: the kernel tells no %s pressure (%s)", resource, failure)
            return None


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g} %"
