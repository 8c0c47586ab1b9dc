# SPDX-License-Identifier: MIT
"""What has become known of the pages of each pool since it was searched, and when that is enough.

A pool is searched when an eighth of it is news, when some have been waiting for INDEX_SECONDS, or,
while the search is cheap, as soon as none of its regions is due. News that promise less than the
search costs wait for longer, until more comes or the search is cheap enough for what it is.

Where little is new, a search is about that alone (heads.py). After one of these, or where requests
were not carried out, one about everything is owed, ALL_SECONDS after the last: there are pages that
could be merged and were not, for reasons that pass. The kernel was busy with them, a cap was
reached, or so many others shared them that merging would have freed nothing. As long as such a
reason does not pass, the next one is owed after twice as long.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from mergemem_agent.heads import Heads
from mergemem_agent.targets import Pool

Array = np.ndarray[Any, np.dtype[Any]]

INDEX_SECONDS: Final = 30.0
CHEAP_INDEX_PAGES: Final = 65536
ALL_SECONDS: Final = 60.0
_MOST_ALL_SECONDS: Final = 1800.0


@dataclass
class _PoolNews:
    """Pages of a pool that are worth a search."""

    searched: float  # when the last search ended, or when there was news for the first time
    samples: int = 0  # by samples, which others may have
    deep: int = 0  # by full checksums
    heads: Heads = field(default_factory=Heads)  # of both
    owed: bool = False  # a search about everything, if there are no news by then, too
    failed: bool = False  # requests of the last search were not carried out
    owed_seconds: float = ALL_SECONDS  # after the last one about everything
    searched_all: float = -math.inf  # when the last search began that was about everything
    searched_deep: float = -math.inf  # ... or about all that was read in full


class News:
    """The news of all pools."""

    def __init__(self) -> None:
        """Begin with none."""
        self._pools: dict[Pool, _PoolNews] = {}

    def __len__(self) -> int:
        """Return how many pools are known, whether there is news of them or not."""
        return len(self._pools)

    def add(self, pool: Pool, samples: int = 0, deep: int = 0, heads: Array | None = None) -> None:
        """Take in how many pages of a pool are news: by their samples, and by full checksums.

        `heads` are theirs; None: nobody knows.
        """
        news = self._pools.setdefault(pool, _PoolNews(time.monotonic()))
        news.samples += samples
        news.deep += deep
        if samples or deep:
            news.heads.add(heads)

    def owe(self, pool: Pool) -> None:
        """Have a pool searched once more: requests were not carried out. Nothing has to be new."""
        news = self._pools.setdefault(pool, _PoolNews(time.monotonic()))
        news.owed = news.failed = True

    def clear(self) -> None:
        """Forget all."""
        self._pools.clear()

    def searches(
        self,
        pages: Mapping[Pool, int],
        due_in: Callable[[Pool], bool],
        rest_seconds: Callable[[int, int], float],
    ) -> list[tuple[Pool, bool]]:
        """Return the pools that are worth a search, and whether by samples or less.

        `pages` has the size of each pool that is there; others are forgotten. `rest_seconds` tells
        how long a search of so many pages should wait that is about so many; 0: it is worth it.
        """
        for pool in self._pools.keys() - pages.keys():
            del self._pools[pool]
        now = time.monotonic()

        def is_enough(pool: Pool, fresh: int) -> bool:
            if not fresh:
                return False
            if fresh * 8 >= pages[pool]:
                return True
            rest = rest_seconds(pages[pool], fresh)
            if now - self._pools[pool].searched >= max(INDEX_SECONDS, rest):
                return True
            cheap = pages[pool] <= fresh * 256 + CHEAP_INDEX_PAGES
            return cheap and not rest and not due_in(pool)

        def is_owed(pool: Pool, news: _PoolNews) -> bool:
            if not news.owed or now - news.searched_all < news.owed_seconds:
                return False
            return now - news.searched >= rest_seconds(pages[pool], 0)

        found = []
        for pool, news in self._pools.items():
            if is_enough(pool, news.samples) or is_owed(pool, news):
                found.append((pool, True))
            elif is_enough(pool, news.deep):
                found.append((pool, False))
        return found

    @contextmanager
    def taken(self, pool: Pool, samples: bool, everything: bool = False) -> Iterator[Array | None]:
        """Count anew while a pool is searched; one that ends early leaves all of it as news.

        Gives the heads that the search is about, as Heads.table() has them; None: `everything`.
        """
        news = self._pools[pool]
        before, deep_before, heads = news.samples, news.deep, news.heads
        news.samples = news.deep = 0
        news.heads = Heads()
        now = time.monotonic()
        all_before = news.searched_all if samples else max(news.searched_all, news.searched_deep)
        table = None
        if not everything and now - all_before < ALL_SECONDS:
            table = heads.table()
        owed, news.owed = news.owed, table is not None
        longer = min(2 * news.owed_seconds, _MOST_ALL_SECONDS)
        news.owed_seconds = longer if news.failed else ALL_SECONDS
        news.failed = False
        try:
            yield table
        except BaseException:
            self._put_back(news, before, deep_before, heads)
            news.owed |= owed
            raise
        if not samples:
            self._put_back(news, before, 0, heads)
        if table is None and samples:
            news.searched_all = now
        elif table is None:
            news.searched_deep, news.owed = now, news.owed or owed
        news.searched = time.monotonic()

    @staticmethod
    def _put_back(news: _PoolNews, samples: int, deep: int, heads: Heads) -> None:
        news.samples += samples
        news.deep += deep
        if samples or deep:
            news.heads.add_all_of(heads)
