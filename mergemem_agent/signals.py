# SPDX-License-Identifier: MIT
"""Signals that the agent reacts to, between two slices of work and in the middle of a pause."""

from __future__ import annotations

import select
import signal
import socket
from types import FrameType


class Signals:
    """Flags that signals set, and a sleep that they end."""

    def __init__(self) -> None:
        """Install the handlers. Must be called in the main thread."""
        self.stop = False
        self.reload = False
        # Without this socket a signal that comes just before a sleep would be slept over.
        self._wake_reader, self._wake_writer = socket.socketpair()
        for end in (self._wake_reader, self._wake_writer):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGHUP, self._on_reload)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.stop = True

    def _on_reload(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.reload = True

    @property
    def pending(self) -> bool:
        """Whether there is something to react to."""
        return self.stop or self.reload

    def sleep(self, seconds: float, descriptor: int | None = None) -> bool:
        """Sleep, but not beyond a signal, nor beyond the moment when `descriptor` is readable.

        Returns whether that is why it ended.
        """
        if self.pending or seconds <= 0:
            return False
        waited_for = [self._wake_reader.fileno()]
        if descriptor is not None:
            waited_for.append(descriptor)
        readable, _, _ = select.select(waited_for, [], [], seconds)
        if waited_for[0] in readable:
            self._wake_reader.recv(4096)
        return descriptor in readable
