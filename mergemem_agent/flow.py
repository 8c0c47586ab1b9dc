# SPDX-License-Identifier: MIT
"""Conservation: how many pages went from one stage of the scan to which other, all accounted for.

For each stage, at any time: pages that came in = pages that went out, by where they went + pages
that are held. What is held is not counted here but follows; tests count it and compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mergemem_agent.region import STAGES, Regions
from mergemem_agent.word import Stage

Array = np.ndarray[Any, np.dtype[Any]]


class Flow:
    """The moves of all pages that the agent ever knew."""

    def __init__(self) -> None:
        """Begin with none."""
        self._moves: Array = np.zeros((STAGES, STAGES), dtype=np.int64)

    def take(self, regions: Regions) -> None:
        """Add the moves that some regions have counted since this was called last."""
        if len(regions.moves):
            self._moves += regions.take_moves().reshape(STAGES, STAGES)

    def copy(self) -> Flow:
        """Return a copy that does not change when this one does."""
        other = Flow()
        other._moves = self._moves.copy()
        return other

    def held(self, stage: Stage) -> int:
        """Return how many pages are in a stage."""
        return int(self._moves[:, stage].sum() - self._moves[stage].sum())

    def moves(self) -> Iterator[tuple[Stage, Stage, int]]:
        """Yield each pair of different stages between which pages went, and how many did."""
        for before, after in zip(*np.nonzero(self._moves), strict=True):
            if before != after:
                yield Stage(int(before)), Stage(int(after)), int(self._moves[before, after])
