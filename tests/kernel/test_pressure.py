# SPDX-License-Identifier: MIT
"""A host that is short of memory gives the agent more CPU time, and takes it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from tests.kernel.actor import Stage
from tests.kernel.agent import Agent
from tests.kernel.cgroup import Cgroup
from tests.kernel.sharing import wait_until

SEED = 115
NOBODY = "policies: [{name: nobody, select: {executable: /nobody}}]\n"
SETTINGS = 'memory_pressure: "15%", memory_pressure_budget: "40%", cpu_pressure: "100%"'


@contextmanager
def memory_is_short(stage: Stage) -> Iterator[None]:
    """One process above memory.high, which the kernel makes wait for memory again and again."""
    group = Cgroup()
    (group.path / "memory.high").write_text("1M")
    over = group.add(stage.start())
    relieved = Event()

    def want_more() -> None:
        while not relieved.is_set():
            over.region(128, SEED)

    wanting = Thread(target=want_more)
    wanting.start()
    try:
        yield
    finally:
        relieved.set()
        (group.path / "memory.high").write_text("max")
        wanting.join()
        over.exit()
        wait_until(lambda: not (group.path / "cgroup.procs").read_text(), "the process is gone")
        group.remove()


def memory_pressure() -> float:
    some = Path("/proc/pressure/memory").read_text().split()[1]
    return float(some.removeprefix("avg10="))


def test_budget_follows_memory_pressure(stage: Stage, tmp_path: Path) -> None:
    with Agent(tmp_path, NOBODY, "5%", SETTINGS) as agent:
        assert agent.metrics()["mergemem_budget_ratio"] == 0.05
        with memory_is_short(stage):
            wait_until(lambda: agent.metrics()["mergemem_budget_ratio"] == 0.4, "more budget")
            assert agent.metrics()['mergemem_pressure_ratio{resource="memory"}'] > 0.075
        wait_until(lambda: agent.metrics()["mergemem_budget_ratio"] == 0.05, "as it was")
        assert memory_pressure() < 15
        assert "pressure is now memory" in agent.log
        assert "pressure is now none" in agent.log
        agent.stop()
