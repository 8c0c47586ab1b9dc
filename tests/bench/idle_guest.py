# SPDX-License-Identifier: MIT
"""What the agent takes while there is nothing to gain, inside the guest.

    python -m tests.bench.idle_guest DIRECTORY [--mib-each N] [--minutes N]

Started by idle.py, which makes figures of the facts that this leaves in the directory. Nothing asks
the agent anything while it is measured: the kernel tells its CPU time and how often it woke up, and
its status file, which it writes anyway, the rest. So the stages are told as of the last snapshot
before, 25 s old at most. Wrong bytes, a dead process or an agent that fails end it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from mergemem_agent.agent import STATUS_FILE
from tests.bench.race.cases import PAGES_PER_MIB
from tests.bench.race.contestant import cpu_of
from tests.bench.race.guest import HUGE_PAGES, tell
from tests.bench.race.service import SCRATCH, Agent, memory_of
from tests.bench.race.workload import Workload
from tests.demo import mergemem

PROCESSES = 4
MIB_EACH = 1024
MINUTES = 8
NAME, KIND = "idle", "few"
# All else by default; the budget only says how soon it has gone through all.
POLICY = f"""\
agent:
  budget: "100%"
  cpu_pressure: "100%"
policies:
  - name: {NAME}
    select:
      command_line: '^[^ ]*race-workload'
"""
# It has gone through all when it has merged and nothing was added for so long.
QUIET_SECONDS = 45.0
LIMIT_SECONDS = 900.0
POLL_SECONDS = 2.0


class Unfinished(Exception):
    """The agent has not gone through all in time."""


def status() -> dict[str, Any]:
    """The agent's last snapshot; that it tells it costs it nothing more."""
    found: dict[str, Any] = json.loads(STATUS_FILE.read_text(encoding="utf-8"))
    return found


def moment(pid: int) -> dict[str, Any]:
    """Everything that is compared with a later moment."""
    snapshot = status()
    counts = snapshot["counts"]
    return {
        "at": time.monotonic(),
        "cpu_ns": cpu_of(pid).ns,
        "threads": threads(pid),
        "snapshot_age": time.time() - snapshot["taken_at"],
        "stages": counts["cpu_seconds"],
        "rounds": counts["rounds"],
        "pages": counts["policies"].get(NAME, {}),
        "memory": snapshot["memory"].get(NAME, {}),
    }


def threads(pid: int) -> dict[str, dict[str, int]]:
    """CPU time, and how often it went to sleep by itself, of the main thread and of all others."""
    found = {name: {"ns": 0, "sleeps": 0} for name in ("main", "others")}
    for path in Path(f"/proc/{pid}/task").iterdir():
        one = found["main" if path.name == str(pid) else "others"]
        one["ns"] += int((path / "schedstat").read_text(encoding="ascii").split()[0])
        text = (path / "status").read_text(encoding="utf-8")
        one["sleeps"] += int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return found


def wait_until_done(pid: int, pages: int) -> dict[str, Any]:
    """Until all pages were looked at, some are merged, and no more have been for a while."""
    begun = changed = time.monotonic()
    merged = 0
    while time.monotonic() < begun + LIMIT_SECONDS:
        time.sleep(POLL_SECONDS)
        now = moment(pid)
        if now["memory"].get("merged_pages", 0) != merged:
            merged, changed = now["memory"]["merged_pages"], now["at"]
            tell(f"{merged} pages merged, {now['pages']['scanned']} looked at")
        through = now["memory"].get("remembered_pages", 0) >= pages
        if through and merged and now["at"] >= changed + QUIET_SECONDS:
            return now | {"seconds": changed - begun}
    raise Unfinished(f"not through after {LIMIT_SECONDS:g} s: {now}")


def measure(pid: int, minutes: int) -> list[dict[str, Any]]:
    """A moment at the beginning, and one at the end of each minute."""
    moments = [moment(pid)]
    for number in range(1, minutes + 1):
        time.sleep(max(0.0, moments[0]["at"] + 60 * number - time.monotonic()))
        moments.append(moment(pid))
        spent = moments[-1]["cpu_ns"] - moments[-2]["cpu_ns"]
        tell(f"minute {number}: {spent / 1e9:.3f} s CPU, {moments[-1]}")
    return moments


def scrape_seconds(pid: int) -> float:
    """CPU time of the agent to answer one scrape, the second, by the way."""
    mergemem.scrape()
    before = cpu_of(pid).ns
    mergemem.scrape()
    return (cpu_of(pid).ns - before) / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description="the agent with nothing to gain, in the guest")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--mib-each", type=int, default=MIB_EACH)
    parser.add_argument("--minutes", type=int, default=MINUTES)
    arguments = parser.parse_args()
    pages_each = arguments.mib_each * PAGES_PER_MIB
    # Small pages, each of which is looked at by itself: the most work there can be.
    HUGE_PAGES.write_text("madvise", encoding="ascii")
    mergemem.load_module()
    facts: dict[str, Any] = {"pages": PROCESSES * pages_each, "processes": PROCESSES}
    agent = Agent()
    try:
        pid = agent.obey(POLICY)
        facts["start"] = agent.start_facts
        tell(f"the agent runs: {facts['start']}")
        workload = Workload(KIND, pages_each, "none")
        begun = time.monotonic()
        workload.start(PROCESSES)
        facts["fill_seconds"] = time.monotonic() - begun
        tell(f"memory filled in {facts['fill_seconds']:.0f} s")
        facts["done"] = wait_until_done(pid, facts["pages"])
        tell(f"through after {facts['done']['seconds']:.0f} s more; nothing to gain from here on")
        facts["moments"] = measure(pid, arguments.minutes)
        facts["memory"] = memory_of(pid)
        facts["scrape_seconds"] = scrape_seconds(pid)
        workload.verify()
        tell("every byte is as it was")
        workload.stop()
        agent.stop()
        mergemem.unload_module()
    finally:
        facts["release"] = os.uname().release
        text = json.dumps(facts)
        (arguments.directory / "facts.json").write_text(text, encoding="utf-8")
        if (SCRATCH / "agent.log").exists():
            shutil.copy(SCRATCH / "agent.log", arguments.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
