# SPDX-License-Identifier: MIT
"""What a search is about where little is new."""

from __future__ import annotations

import numpy as np

from mergemem_agent.heads import MOST_PAGES, Heads, heads_of

WORDS = np.array([0x1234_5678_9ABC_DEF0, 0x1234_0000_0000_0001, 0xFFFF << 48], dtype=np.uint64)


def told(heads: Heads) -> list[int] | None:
    table = heads.table()
    return None if table is None else np.flatnonzero(table).tolist()


def test_heads_are_the_first_bits_of_words() -> None:
    heads = Heads()
    assert told(heads) == []
    heads.add(heads_of(WORDS))
    assert told(heads) == [0x1234, 0xFFFF]


def test_of_many_pages_they_are_all() -> None:
    assert heads_of(np.repeat(WORDS, MOST_PAGES)) is None
    heads = Heads()
    most = np.arange(MOST_PAGES, dtype=np.uint16)
    heads.add(most)
    assert told(heads) == most.tolist()
    heads.add(most[:1])
    assert told(heads) is None
    heads.add(most)
    assert told(heads) is None


def test_what_nobody_knows_is_everything() -> None:
    heads, other = Heads(), Heads()
    heads.add(heads_of(WORDS[:2]))
    other.add(heads_of(WORDS[2:]))
    other.add_all_of(heads)
    assert told(other) == [0x1234, 0xFFFF]
    heads.add(None)
    other.add_all_of(heads)
    assert told(other) is None
