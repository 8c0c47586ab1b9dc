# SPDX-License-Identifier: MIT
"""Counts the fleet's frames about once a second, while everything else goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.demo import frames

INTERVAL_SECONDS = 1.0


@dataclass(frozen=True)
class Sample:
    """The fleet at one instant; seconds of the monotonic clock."""

    seconds: float
    frames: int
    merged_mappings: int
    zero_mappings: int


@dataclass(frozen=True)
class Act:
    """A named stretch of time."""

    name: str
    start_seconds: float
    end_seconds: float


@dataclass
class Watch:
    """The record of a run: samples by a thread of its own, and the acts as they come."""

    pids: Callable[[], tuple[int, ...]]
    samples: list[Sample] = field(default_factory=list)
    acts: list[Act] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def sample(self) -> Sample:
        """Count now."""
        with self._lock:
            found = frames.count(self.pids())
            sample = Sample(
                time.monotonic(), found.frames, found.merged_mappings, found.zero_mappings
            )
            self.samples.append(sample)
        return sample

    @contextmanager
    def act(self, name: str) -> Iterator[None]:
        """What happens inside is recorded under this name."""
        start = time.monotonic()
        yield
        self.acts.append(Act(name, start, time.monotonic()))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            self.sample()
