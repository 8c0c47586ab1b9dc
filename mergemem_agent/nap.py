# SPDX-License-Identifier: MIT
"""How long the agent sleeps while nothing is due, and whether an event may wake it.

The first event after the ring buffer was emptied wakes whoever waits for it. Where processes come
and go all the time, that would be at once; so there, a nap ends when it is worth looking again.
"""

from __future__ import annotations

from typing import Final

# How often the agent looks around without being woken: for hints, and for processes that have grown
# into a policy. Ever more rarely, as long as nothing comes.
IDLE_SECONDS: Final = 2.0
IDLE_MAX_SECONDS: Final = 5.0


class Naps:
    """The naps of one stretch of time in which nothing is due."""

    def __init__(self, poll_seconds: float) -> None:
        """Look for events once in `poll_seconds` at most."""
        self._poll_seconds = poll_seconds
        self._quiet_seconds = IDLE_SECONDS

    def next(self, stirred: bool, followed_seconds_ago: float) -> tuple[float, bool]:
        """Return how long to sleep now, in seconds, and whether an event ends it.

        `stirred` tells whether processes have just come or gone, or wait to be looked at.
        """
        if stirred:
            self._quiet_seconds = IDLE_SECONDS
            return max(0.0, self._poll_seconds - followed_seconds_ago), False
        seconds = self._quiet_seconds
        self._quiet_seconds = min(2 * seconds, IDLE_MAX_SECONDS)
        return seconds, True
