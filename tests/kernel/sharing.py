# SPDX-License-Identifier: MIT
"""Steps that most tests take: make equal pages, merge them, break the sharing again."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from tests.kernel import frames
from tests.kernel.actor import Page, Region
from tests.kernel.contract import Result
from tests.kernel.wire import Client, Refused

# Far more than anything here takes, in a slow guest on a busy host.
DEADLINE_SECONDS = 120


def pairs(*regions: Region) -> list[Sequence[Page]]:
    """A group for each page number: the pages of that number in all regions."""
    return [list(pages) for pages in zip(*regions, strict=True)]


def flat(results: Sequence[Sequence[Result]]) -> list[Result]:
    """All results of a request."""
    return [result for group in results for result in group]


def merge_all(client: Client, *regions: Region) -> None:
    """Merge equal regions page by page; proven by frames, before and after."""
    for group in pairs(*regions):
        frames.assert_distinct(group)
    assert set(flat(client.merge(*pairs(*regions)))) == {Result.SUCCESS}
    for group in pairs(*regions):
        frames.assert_shared(group)
    for region in regions:
        region.verify()


def write_privately(writer: Region, index: int, *others: Region) -> None:
    """Write to a shared page: its owner gets a frame of its own, and nobody else sees the byte.

    Puts the byte back at the end, so that the whole page can be verified.
    """
    shared = writer[index].frame
    assert [other[index].frame for other in others] == [shared] * len(others)
    original = writer.original(index)
    writer.write(index, original ^ 0xFF)
    assert writer[index].frame not in (0, shared)
    assert writer.read(index) == original ^ 0xFF
    for other in others:
        assert other[index].frame == shared
        other.verify()
    writer.write(index, original)
    writer.verify()


@dataclass(frozen=True)
class Merged:
    """Two processes that share eight frames."""

    PAGES: ClassVar[int] = 8
    SEED: ClassVar[int] = 30

    alice: Region
    bob: Region
    frames: list[int]

    def assert_shared(self) -> None:
        """Still so, both still right."""
        for group in pairs(self.alice, self.bob):
            frames.assert_shared(group)
        self.alice.verify()
        self.bob.verify()


def wait_until(condition: Callable[[], bool], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    """Poll, ever more slowly, until something is so; a failed assertion when it never is."""
    deadline = time.monotonic() + seconds
    pause_seconds = 0.01
    while not condition():
        assert time.monotonic() < deadline, f"still not so: {what}"
        time.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, 0.5)


@contextmanager
def unless_busy() -> Iterator[None]:
    """A request that may be BUSY: whoever disturbs may hold mmap_lock for longer than it waits."""
    try:
        yield
    except Refused as refused:
        if refused.errno != errno.EBUSY:
            raise
