# SPDX-License-Identifier: MIT
"""How long the agent sleeps while nothing is due, and what may wake it.

The first event after the ring buffer was emptied wakes whoever waits for it. Where processes come
and go all the time, that would be at once; so there, a nap ends when it is worth looking again.
Where memory is written to all the time, the first hint after a drain would be there at once, too;
so the agent looks for hints by itself, and asks to be woken when there were none for a while.
"""

from __future__ import annotations

from typing import Final, NamedTuple

# How often the agent looks around without being woken: for hints, and for processes that have grown
# into a policy. Ever more rarely, as long as nothing comes: in as long as nothing has come.
IDLE_SECONDS: Final = 2.0
IDLE_MAX_SECONDS: Final = 20.0
# Without any hint for so long, it is asked to be woken by the next.
QUIET_SECONDS: Final = 6.0


class Nap(NamedTuple):
    """One of them."""

    seconds: float
    for_events: bool  # an event ends it
    for_hints: bool  # and the next hint is one


class Naps:
    """The naps of one agent; all times are of the same clock."""

    def __init__(self, poll_seconds: float, now: float) -> None:
        """Look for events once in `poll_seconds` at most."""
        self._poll_seconds = poll_seconds
        self._quiet_since = now

    def stir(self, now: float) -> None:
        """Sleep lightly from now on: there were hints."""
        self._quiet_since = now

    def next(self, now: float, stirred: bool, followed_seconds_ago: float) -> Nap:
        """Return how to sleep now.

        `stirred` tells whether processes have just come or gone, or wait to be looked at.
        """
        if stirred:
            self.stir(now)
            wait_seconds = max(0.0, self._poll_seconds - followed_seconds_ago)
            return Nap(wait_seconds, for_events=False, for_hints=False)
        quiet_seconds = now - self._quiet_since
        seconds = min(IDLE_MAX_SECONDS, max(IDLE_SECONDS, quiet_seconds))
        return Nap(seconds, for_events=True, for_hints=quiet_seconds >= QUIET_SECONDS)
