# SPDX-License-Identifier: MIT
"""Telling systemd how the agent is doing: the protocol of sd_notify(3), which is a datagram."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Mapping


class Notifier:
    """Sends states to the service manager, or nowhere when there is none.

    A manager that does not listen must never stop the agent: errors are swallowed.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """Take NOTIFY_SOCKET and WATCHDOG_USEC from the environment."""
        path = environment.get("NOTIFY_SOCKET", "")
        # A leading @ stands for a name in the abstract namespace.
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._ping_seconds = _watchdog_seconds(environment) / 2
        self._next_ping = 0.0
        self._status = ""

    def ready(self) -> None:
        """Say that start-up, or a reload, is finished."""
        self._send("READY=1")

    def reloading(self) -> None:
        """Say that a reload begins; the time lets the manager match it with its own request."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now_us}")

    def stopping(self) -> None:
        """Say that the agent is on its way out."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """Say in one line what the agent is doing, for `systemctl status`."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def alive(self) -> None:
        """Ping the watchdog, if there is one and half of its time has passed."""
        now = time.monotonic()
        if self._ping_seconds and now >= self._next_ping:
            self._next_ping = now + self._ping_seconds
            self._send("WATCHDOG=1")

    def due_seconds(self) -> float:
        """Return when to call alive() at the latest; infinite without a watchdog."""
        return max(0.0, self._next_ping - time.monotonic()) if self._ping_seconds else math.inf

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            try:
                # A manager that does not read must not stop the agent.
                sender.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT, self._address)
            except OSError:
                return


def _watchdog_seconds(environment: Mapping[str, str]) -> float:
    """Return the watchdog's time; 0 when there is none, or when it watches another process."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    microseconds = environment.get("WATCHDOG_USEC", "0")
    return int(microseconds) / 1e6 if microseconds.isdecimal() else 0.0
