# SPDX-License-Identifier: MIT
"""Merges and how long they last, page by page, whoever merged: by frames that are shared.

A page is merged once another process maps its frame, too; nothing else shares frames in these
processes. It is broken once a page that is written to has another frame.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tests.demo.frames import ENTRY_BYTES, FRAME, PAGE_BYTES, PRESENT

BROKEN_SECONDS = 60.0
# As in workload.c.
CHURN_PART = 4

Frames = npt.NDArray[np.uint64]


def frames_of(pid: int, address: int, pages: int) -> Frames:
    """The frame of each page of a range; 0 where there is none."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        offset = address // PAGE_BYTES * ENTRY_BYTES
        entries = np.frombuffer(os.pread(pagemap.fileno(), pages * ENTRY_BYTES, offset), np.uint64)
    return np.where(entries & PRESENT, entries & FRAME, np.uint64(0))


def written_parts(pages: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Which pages of processes of so many pages are written to."""
    return np.concatenate([np.arange(each) >= each - each // CHURN_PART for each in pages])


@dataclass
class Breaks:
    """Counts over a series of looks at the same pages."""

    written: npt.NDArray[np.bool_]
    merged: int = 0
    broken: int = 0  # of these, within BROKEN_SECONDS
    _frames: Frames | None = field(default=None, repr=False)
    _shared: npt.NDArray[np.bool_] | None = field(default=None, repr=False)
    _since: npt.NDArray[np.float64] | None = field(default=None, repr=False)

    def look(self, now: float, parts: Sequence[Frames]) -> None:
        """Take in the frames of all pages, in the order of `written`."""
        frames = np.concatenate(parts)
        _, inverse, counts = np.unique(frames, return_inverse=True, return_counts=True)
        shared = (counts[inverse] > 1) & (frames != 0)
        if self._frames is None or self._shared is None or self._since is None:
            fresh, self._since = shared, np.zeros(len(frames))
        else:
            changed = frames != self._frames
            broken = self._shared & changed & self.written
            self.broken += int(np.count_nonzero(broken & (now - self._since <= BROKEN_SECONDS)))
            # A frame that was changed without a write was merged with yet others: no news.
            fresh = shared & (~self._shared | broken)
        self.merged += int(np.count_nonzero(fresh))
        self._since[fresh] = now
        self._frames, self._shared = frames, shared
