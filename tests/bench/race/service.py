# SPDX-License-Identifier: MIT
"""mergemem as a contestant: the agent as a service that was started before."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

from tests.bench.race.cases import HELD_PERCENT, MERGEMEM, MERGEMEM_HELD
from tests.bench.race.contestant import Contestant, cpu_of
from tests.demo import mergemem

SCRATCH = Path("/run/race")
# Until it waits for work.
START_REST_SECONDS, REST_SECONDS = 3.0, 1.0
SETTLE = "2s"
# How often it asks /proc for new processes: while racing, and while others race.
RESCAN, RESCAN_ASIDE = "10s", "1h"
# As deploy/mergemem.service has it.
NICE = 10
PROCESSES = "^[^ ]*(race-workload|redis-server)|race[.]prefork"
# Somebody always waits for one of the two processors of the guest: no reason to go slow here.
# A stretch of the default settle time, 10 s, to what a run of a minute has room for.
POLICY = """\
agent:
  budget: "{budget}%"
  rescan: "{rescan}"
  cpu_pressure: "100%"
policies:
  - name: race
    select:
      command_line: '{command_line}'
    settle: "{settle}"
"""
METRICS = (
    "mergemem_cpu_seconds_total", "mergemem_stage_cpu_seconds_total",
    "mergemem_scanned_pages_total", "mergemem_checksummed_pages_total",
    "mergemem_settled_pages_total", "mergemem_remembered_pages", "mergemem_nominated_pages_total",
    "mergemem_merged_pages_total", "mergemem_freed_pages_total", "mergemem_zeroed_pages_total",
    "mergemem_hint", "mergemem_errors_total",
)  # fmt: skip


SERVICES = (MERGEMEM, MERGEMEM_HELD)
# The service runs, and no process is there for it to look at.
NOTHING = "^nothing at all$"


class Agent:
    """The running service, started when it is first needed, and given its orders by reloads."""

    def __init__(self) -> None:
        self._running: Running | None = None
        self.start_facts: dict[str, Any] = {}

    def obey(self, policy: str) -> int:
        """Have it follow a policy and no other; its process id."""
        SCRATCH.mkdir(exist_ok=True)
        path = SCRATCH / "policy.yaml"
        path.write_text(policy, encoding="utf-8")
        if self._running:
            self._running.reload()
        else:
            self._start(path)
        assert self._running
        return self._running.pid

    def stop(self) -> None:
        """End it, if it runs; it must end well."""
        if self._running:
            stopped = self._running.stop()
            self._running = None
            if stopped.status:
                raise mergemem.CommandError(f"the agent ended with status {stopped.status}")

    def _start(self, policy: Path) -> None:
        log = SCRATCH / "agent.log"
        log.with_suffix(".notify").unlink(missing_ok=True)
        started = time.monotonic()
        self._running = Running(["--policy", str(policy)], log)
        os.setpriority(os.PRIO_PROCESS, self._running.pid, NICE)
        self._running.wait_until_ready()
        seconds = time.monotonic() - started
        time.sleep(START_REST_SECONDS)
        self.start_facts = {
            "start_seconds": seconds,
            "start_cpu_seconds": cpu_of(self._running.pid).ns / 1e9,
            "memory_before": memory_of(self._running.pid),
        }


class Running(mergemem.Agent):
    """The demo's agent, which reads its policies again when asked to."""

    def reload(self) -> None:
        self._ready.clear()
        os.kill(self.pid, signal.SIGHUP)
        self.wait_until_ready()


class Service(Contestant):
    """The agent, with all of a core or held to a part of one."""

    def __init__(self, name: str, agent: Agent) -> None:
        self.name = name
        self._agent = agent
        self._budget = HELD_PERCENT if name == MERGEMEM_HELD else 100

    def start(self) -> dict[str, Any]:
        self.pid = self._agent.obey(self._policy(PROCESSES, RESCAN))
        time.sleep(REST_SECONDS)
        return {"budget_percent": self._budget, "settle": SETTLE, **self._agent.start_facts}

    def account(self) -> dict[str, Any]:
        memory = memory_of(self.pid)
        before = self._agent.start_facts["memory_before"]
        metrics = mergemem.scrape()
        return {
            "memory": memory,
            # Whatever it has allocated since, heaps that Python keeps for later among it.
            "metadata_bytes": max(0, memory["Anonymous"] - before["Anonymous"]),
            "scanner_bytes": before["Pss"],
            "metrics": {name: value for name, value in metrics.items() if name.startswith(METRICS)},
        }

    def stop(self) -> None:
        self._agent.obey(self._policy(NOTHING, RESCAN_ASIDE))

    def _policy(self, command_line: str, rescan: str) -> str:
        return POLICY.format(
            budget=self._budget, rescan=rescan, settle=SETTLE, command_line=command_line
        )


def memory_of(pid: int) -> dict[str, int]:
    """Bytes by kind, of the whole process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii", errors="replace")
    found = dict(re.findall(r"^(Rss|Pss|Anonymous): +(\d+) kB$", text, re.MULTILINE))
    return {name: int(kib) * 1024 for name, kib in found.items()}
