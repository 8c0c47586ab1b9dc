# SPDX-License-Identifier: MIT
"""Heads: what a search is about where little is new, as the first 16 bits of checksums.

Equal pages have equal heads. So a search that leaves out all words with other heads still finds
whole groups, and all of those that a page with one of these is in; of the rest it finds those few
that have the same head by chance.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

HEAD_BITS: Final = 16
# Of more pages, heads are not told one by one: then so many words have one of them that leaving out
# the others is not worth it.
MOST_PAGES: Final = 4096

_SHIFT: Final = np.uint64(64 - HEAD_BITS)
_PLACE: Final = 3 if sys.byteorder == "little" else 0


def heads_of(words: Array) -> Array | None:
    """Return the heads of some words, each once; None: of all words there may be."""
    if len(words) > MOST_PAGES:
        return None
    return np.unique((words >> _SHIFT).astype(np.uint16))


def each_head(joined: bytes) -> Array:
    """Return the head of each of many words, as they lie in memory."""
    heads: Array = np.frombuffer(joined, dtype=np.uint16)[_PLACE::4]
    return heads


class Heads:
    """The heads of what is new; in the end maybe all that there are."""

    def __init__(self) -> None:
        """Begin with none."""
        self._parts: list[Array] | None = []
        self._pages = 0

    def add(self, heads: Array | None) -> None:
        """Take in some; None: all that there are."""
        if self._parts is None:
            return
        if heads is None or self._pages + len(heads) > MOST_PAGES:
            self._parts = None
        elif len(heads):
            self._parts.append(heads)
            self._pages += len(heads)

    def add_all_of(self, other: Heads) -> None:
        """Take in those of another one."""
        for heads in [None] if other._parts is None else other._parts:
            self.add(heads)

    def table(self) -> Array | None:
        """Return for each head whether it is one of these, as 65,536 bools; None: all are."""
        if self._parts is None:
            return None
        found = np.zeros(1 << HEAD_BITS, dtype=np.bool_)
        for heads in self._parts:
            found[heads] = True
        return found
