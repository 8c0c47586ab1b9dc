# SPDX-License-Identifier: MIT
"""What the agent does while there is nothing to do: sleep, whatever comes."""

from __future__ import annotations

import itertools
import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mergemem_agent import agent as service
from mergemem_agent import nap
from mergemem_agent.agent import Agent, Options
from mergemem_agent.hint import Hint, HintState, ProcessEvents
from mergemem_agent.module import Module
from mergemem_agent.notify import Notifier
from mergemem_agent.procfs import ProcessId, ProcFs
from tests.unit.test_agent import free_port

POLICY = """\
agent: {{budget: "5%", metrics_port: {port}}}
policies:
  - name: nobody
    select: {{executable: /nonexistent}}
"""
SECONDS = 1.0
# Of CPU time: far more than a few wakes take, and far less than a second of turning around.
A_LITTLE_SECONDS = SECONDS / 4


class Source:
    """Hints that are always pending, and events when somebody writes to the pipe."""

    poll_seconds = 0.25

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.pending = False
        self.asked_to_wake = 0
        self.may_ask = True
        self.taken: Callable[[], None] = lambda: None

    def watch(self, processes: Iterable[ProcessId]) -> None:
        pass

    def hints(self, processes: Iterable[ProcessId]) -> list[Hint]:  # noqa: ARG002
        return []

    def has_hints(self) -> bool:
        return self.pending

    def wake_for_hints(self) -> bool:
        self.asked_to_wake += self.may_ask
        return self.may_ask

    def descriptor(self) -> int:
        return self.reader

    def events(self) -> ProcessEvents:
        while select.select([self.reader], [], [], 0)[0]:
            os.read(self.reader, 100)
        self.taken()
        return ProcessEvents()

    def state(self) -> HintState:
        return HintState()

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def agent(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.setattr(service, "open_hints", lambda _: source)
    monkeypatch.setattr(Module, "is_loaded", staticmethod(lambda: False))
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY.format(port=free_port()))
    started = Agent(Options((policy,), None, tmp_path / "status.json"), ProcFs(), Notifier({}))
    yield started
    started._server.close()
    source.close()
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def soon_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Already the first nap, of two seconds, ends with a hint."""
    monkeypatch.setattr(nap, "QUIET_SECONDS", 0.0)


def cpu_seconds(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def test_an_overdraft_is_slept_off_whatever_hints_there_are(agent: Agent, source: Source) -> None:
    source.pending = True
    agent._budget._agent.pay(SECONDS * 5 / 100, time.monotonic())
    assert cpu_seconds(agent._pace) < A_LITTLE_SECONDS
    assert agent._budget.wait_seconds() == 0


def test_without_the_module_hints_wake_nobody(agent: Agent, source: Source) -> None:
    source.pending = True
    agent._turn()
    deadline = time.monotonic() + SECONDS

    def turn() -> None:
        while time.monotonic() < deadline:
            agent._turn()

    assert cpu_seconds(turn) < A_LITTLE_SECONDS


def test_hints_end_the_wait_for_work(agent: Agent, source: Source) -> None:
    source.pending = True
    before = time.monotonic()
    agent._naps.stir(before - 600.0)
    agent._idle(600.0)
    after = time.monotonic()
    assert after < before + 60
    assert not agent._naps.next(after, stirred=False, followed_seconds_ago=0.0).for_hints


@pytest.mark.usefixtures("soon_quiet")
def test_hints_wake_an_agent_that_has_long_been_idle(agent: Agent, source: Source) -> None:

    def write_to_memory() -> None:
        deadline = time.monotonic() + 10
        while not source.asked_to_wake and time.monotonic() < deadline:
            time.sleep(0.01)
        source.pending = True
        os.write(source.writer, b"x")

    agent._pipeline.find_targets()
    before = time.monotonic()
    with ThreadPoolExecutor() as pool:
        writing = pool.submit(write_to_memory)
        agent._idle(20.0)
        writing.result()
    assert time.monotonic() < before + nap.IDLE_SECONDS / 2


@pytest.mark.usefixtures("soon_quiet")
def test_hints_that_came_as_the_agent_asked_to_be_woken_are_not_slept_over(
    agent: Agent, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:

    def too_late() -> bool:
        source.pending = True
        return True

    monkeypatch.setattr(source, "wake_for_hints", too_late)
    agent._pipeline.find_targets()
    before = time.monotonic()
    agent._idle(600.0)
    assert time.monotonic() < before + nap.IDLE_SECONDS / 2


@pytest.mark.usefixtures("soon_quiet")
def test_just_after_a_drain_the_agent_looks_by_itself(agent: Agent, source: Source) -> None:
    """It cannot ask to be woken then, and a hint may just have come."""
    source.may_ask = False
    agent._naps.stir(time.monotonic() - 600.0)
    agent._pipeline.find_targets()
    looks: list[float] = []

    def has_hints() -> bool:
        looks.append(time.monotonic())
        return len(looks) == 2

    source.has_hints = has_hints  # type: ignore[method-assign]
    before = time.monotonic()
    agent._idle(600.0)
    assert time.monotonic() < before + 2 * nap.IDLE_SECONDS


@pytest.mark.usefixtures("soon_quiet")
def test_without_the_module_nobody_asks_to_be_woken_by_hints(agent: Agent, source: Source) -> None:
    agent._idle(SECONDS, hinted=False)
    assert not source.asked_to_wake


def test_the_watchdog_is_not_slept_over(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    monkeypatch.setattr(agent._notifier, "alive", lambda: told.append(time.monotonic()))
    monkeypatch.setattr(agent._notifier, "due_seconds", lambda: SECONDS / 10)
    agent._idle(SECONDS)
    assert len(told) > 5


def test_an_event_just_after_others_waits_asleep(agent: Agent, source: Source) -> None:
    """It makes the descriptor readable at once, and is not yet worth being taken."""
    taken = []

    def write_another() -> None:
        taken.append(time.monotonic())
        if len(taken) < 4:
            os.write(source.writer, b"x")

    agent._pipeline.find_targets()
    source.taken = write_another
    os.write(source.writer, b"x")
    assert cpu_seconds(lambda: agent._idle(2 * SECONDS)) < A_LITTLE_SECONDS
    assert len(taken) >= 4, "each is taken all the same"
    assert min(b - a for a, b in itertools.pairwise(taken)) >= source.poll_seconds * 0.99


def test_a_process_that_waits_to_be_looked_at_is_not_slept_over(
    agent: Agent, source: Source
) -> None:
    """A round has taken the event in, since the agent looked for events itself."""
    agent._pipeline.find_targets()
    agent._pipeline.targets.take_events(ProcessEvents(forked=frozenset([os.getpid()])))
    assert agent._pipeline.targets.waiting
    taken: list[float] = []
    source.taken = lambda: taken.append(time.monotonic())
    before = time.monotonic()
    agent._idle(2 * SECONDS)
    assert taken
    assert taken[0] < before + SECONDS / 2
