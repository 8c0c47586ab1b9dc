# SPDX-License-Identifier: MIT
"""Targets that follow events; what finds them without is in test_scan.py."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from mergemem_agent import targets as module
from mergemem_agent.hint import ProcessEvents
from mergemem_agent.policy import Glob, Policy, PolicySet, Selector
from mergemem_agent.procfs import Process, ProcFs
from mergemem_agent.targets import KERNEL_THREAD_SECONDS, MAX_WAITING, Targets
from tests.unit.sleeper import SLEEPER

SLEEPERS = PolicySet(policies=(Policy(name="sleepers", select=Selector(executable=Glob(SLEEPER))),))


class Clock:
    """Stands for the module time."""

    def __init__(self, now: float) -> None:
        self.now = now

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def targets() -> Targets:
    """Targets that have seen /proc once."""
    targets = Targets(SLEEPERS, ProcFs())
    targets.sync()
    return targets


@pytest.fixture
def sleeper(targets: Targets) -> Iterator[subprocess.Popen[bytes]]:
    """A process that came after that."""
    process = subprocess.Popen([SLEEPER, "600"])
    yield process
    process.kill()
    process.wait()


def pids(targets: Targets) -> set[int]:
    return {target.process.pid for target in targets}


def follow(targets: Targets, events: ProcessEvents, until: set[int]) -> None:
    """Take these events once, then none, until those are targets, or no longer."""
    targets.take_events(events)
    deadline = time.monotonic() + 20
    while not until <= pids(targets) and time.monotonic() < deadline:
        time.sleep(0.02)
        targets.take_events(ProcessEvents())
    assert until <= pids(targets)


def test_a_newcomer_is_found_and_forgotten_by_events(
    targets: Targets, sleeper: subprocess.Popen[bytes]
) -> None:
    targets.take_events(ProcessEvents())
    assert sleeper.pid not in pids(targets)
    follow(targets, ProcessEvents(executed=frozenset({sleeper.pid})), until={sleeper.pid})
    assert targets.take_events(ProcessEvents(ended=frozenset({sleeper.pid})))
    assert sleeper.pid not in pids(targets)
    assert not targets.take_events(ProcessEvents())


def test_an_exec_forgets_what_was_known(targets: Targets, sleeper: subprocess.Popen[bytes]) -> None:
    executed = ProcessEvents(executed=frozenset({sleeper.pid}))
    follow(targets, executed, until={sleeper.pid})
    (before,) = [target for target in targets if target.process.pid == sleeper.pid]
    targets.take_events(executed)
    deadline = time.monotonic() + 20
    while before in targets and time.monotonic() < deadline:
        time.sleep(0.02)
        targets.take_events(ProcessEvents())
    assert before not in targets
    assert sleeper.pid in pids(targets)


def test_lost_events_have_everybody_looked_at(
    targets: Targets, sleeper: subprocess.Popen[bytes]
) -> None:
    deadline = time.monotonic() + 20
    while os.readlink(f"/proc/{sleeper.pid}/exe") != SLEEPER and time.monotonic() < deadline:
        time.sleep(0.02)
    assert targets.take_events(ProcessEvents(complete=False))
    assert sleeper.pid in pids(targets)


def test_those_who_wait_are_bounded(targets: Targets) -> None:
    # Pids that cannot exist: above the kernel's highest.
    for start in range(1 << 23, (1 << 23) + 3 * MAX_WAITING, 1000):
        targets.take_events(ProcessEvents(forked=frozenset(range(start, start + 1000))))
        assert targets.waiting <= MAX_WAITING


def test_repairs_keep_apart(targets: Targets, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = []
    monkeypatch.setattr(targets, "sync", lambda: syncs.append(time.monotonic()))
    for _ in range(5):
        targets.take_events(ProcessEvents(complete=False))
    assert len(syncs) == 1
    monkeypatch.setattr(module, "REPAIR_SECONDS", 0.0)
    targets.take_events(ProcessEvents())  # what was put off
    assert len(syncs) == 2


def test_kernel_threads_are_rarely_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are hundreds on a large host, and nothing comes of them."""
    procfs = ProcFs()
    looked: list[int] = []

    def kernel_thread(pid: int) -> Process | None:
        looked.append(pid)
        found = ProcFs().process(pid)
        return found and replace(found, kernel_thread=True)

    monkeypatch.setattr(procfs, "process", kernel_thread)
    targets = Targets(SLEEPERS, procfs)
    targets.sync()
    assert os.getppid() in looked
    before = time.monotonic()
    monkeypatch.setattr(module, "time", Clock(before + KERNEL_THREAD_SECONDS - 1))
    looked.clear()
    targets.sync()
    assert os.getppid() not in looked
    monkeypatch.setattr(module, "time", Clock(before + KERNEL_THREAD_SECONDS + 1))
    targets.sync()
    assert os.getppid() in looked
