# SPDX-License-Identifier: MIT
"""sd_notify(3), against a real socket."""

import math
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergemem_agent.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    name = f"@mergemem-test-{os.getpid()}" if request.param == "abstract" else f"{tmp_path}/socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0" + name[1:] if name.startswith("@") else name)
        listening.setblocking(False)
        yield listening, name


def received(listening: socket.socket) -> list[str]:
    messages = []
    while True:
        try:
            messages.append(listening.recv(4096).decode())
        except BlockingIOError:
            return messages


def test_states(manager: tuple[socket.socket, str]) -> None:
    listening, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    notifier.ready()
    notifier.status("3 targets")
    notifier.status("3 targets")
    notifier.stopping()
    assert received(listening) == ["READY=1", "STATUS=3 targets", "STOPPING=1"]


def test_reloading_tells_the_monotonic_time(manager: tuple[socket.socket, str]) -> None:
    listening, name = manager
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    Notifier({"NOTIFY_SOCKET": name}).reloading()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    (message,) = received(listening)
    state, told = message.split("\n")
    assert state == "RELOADING=1"
    assert before <= int(told.removeprefix("MONOTONIC_USEC=")) <= after


def test_the_watchdog_is_pinged_when_it_is_time(manager: tuple[socket.socket, str]) -> None:
    listening, name = manager
    hour = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "3600000000"})
    assert hour.due_seconds() == 0
    hour.alive()
    hour.alive()
    assert received(listening) == ["WATCHDOG=1"]
    assert 1790 < hour.due_seconds() <= 1800
    soon = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1"})
    soon.alive()
    time.sleep(0.001)
    soon.alive()
    assert received(listening) == ["WATCHDOG=1", "WATCHDOG=1"]


def test_another_processs_watchdog_is_none_of_ours(manager: tuple[socket.socket, str]) -> None:
    listening, name = manager
    Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}).alive()
    assert received(listening) == []


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": "/nowhere/at/all"}])
def test_without_a_manager_nothing_happens(environment: dict[str, str]) -> None:
    notifier = Notifier(environment)
    notifier.ready()
    notifier.alive()
    assert notifier.due_seconds() == math.inf
    notifier.stopping()


def test_a_manager_that_does_not_read_stops_nobody(manager: tuple[socket.socket, str]) -> None:
    """Sent until the socket is full, and then far beyond: sending must never wait."""
    listening, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    for number in range(5000):
        notifier.status(f"number {number}")
    assert received(listening)[0] == "STATUS=number 0"
