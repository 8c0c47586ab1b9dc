# SPDX-License-Identifier: MIT
"""What pressure makes of the budget, with a /proc/pressure and a clock of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergemem_agent.policy import AgentSettings
from mergemem_agent.pressure import LOOK_SECONDS, Level, Pressure, PressureState

SETTINGS = AgentSettings(
    budget_percent=5.0,
    memory_pressure_percent=10.0,
    memory_pressure_budget_percent=20.0,
    cpu_pressure_percent=60.0,
    cpu_pressure_budget_percent=1.0,
)


class Host:
    """A host under a pressure that the test says."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = 100.0
        self.set(0, 0)

    def set(self, memory: float, cpu: float) -> None:
        """Let tasks wait for so many percent of the time; another look is due."""
        for name, percent in (("memory", memory), ("cpu", cpu)):
            (self.root / name).write_text(
                f"some avg10={percent:.2f} avg60=99.00 avg300=0.00 total=123\n"
                "full avg10=98.00 avg60=99.00 avg300=0.00 total=123\n"
            )
        self.now += LOOK_SECONDS

    def pressure(self) -> Pressure:
        return Pressure(SETTINGS, self.root, lambda: self.now)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize(
    ("memory", "cpu", "level", "budget"),
    [
        (0, 0, Level.NONE, 5),
        (10, 60, Level.NONE, 5),
        (10.01, 60, Level.MEMORY, 20),
        (10, 60.01, Level.CPU, 1),
        (90, 90, Level.CPU, 1),
    ],
)
def test_thresholds(host: Host, memory: float, cpu: float, level: Level, budget: float) -> None:
    host.set(memory, cpu)
    pressure = host.pressure()
    assert pressure.budget_percent() == budget
    assert pressure.state == PressureState(level, memory, cpu)


def test_a_level_is_left_at_half_of_its_threshold(host: Host) -> None:
    pressure = host.pressure()
    for memory, budget in ((10.5, 20), (9, 20), (5.01, 20), (5, 5), (9, 5), (10.5, 20)):
        host.set(memory, 0)
        assert pressure.budget_percent() == budget
    for cpu, budget in ((60.5, 1), (30.5, 1), (30, 20)):
        host.set(10.5, cpu)
        assert pressure.budget_percent() == budget


def test_it_does_not_look_all_the_time(host: Host) -> None:
    pressure = host.pressure()
    assert pressure.budget_percent() == 5
    host.set(50, 0)
    host.now -= LOOK_SECONDS / 2
    assert pressure.budget_percent() == 5
    host.now += LOOK_SECONDS / 2
    assert pressure.budget_percent() == 20


@pytest.mark.parametrize("text", ["", "full avg10=99.00\n", "some avg10=many\n", "some\n"])
def test_what_the_kernel_does_not_tell_changes_nothing(host: Host, text: str) -> None:
    pressure = host.pressure()
    host.set(0, 0)
    (host.root / "memory").unlink()
    (host.root / "cpu").write_text(text)
    assert pressure.budget_percent() == 5
    assert pressure.state == PressureState(Level.NONE, None, None)


def test_other_settings_hold_at_once(host: Host) -> None:
    host.set(50, 0)
    pressure = host.pressure()
    assert pressure.budget_percent() == 20
    pressure.change_settings(AgentSettings(budget_percent=7.0, memory_pressure_percent=100.0))
    assert pressure.budget_percent() == 7
