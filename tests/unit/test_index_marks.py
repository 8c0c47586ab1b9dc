# SPDX-License-Identifier: MIT
"""Which pages a search has read in full, and which it nominates, against a plain model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemem_agent.heads import Heads
from mergemem_agent.index import nominate
from mergemem_agent.region import Regions
from mergemem_agent.word import (
    DEEP,
    FULL,
    HUGE,
    MAP_COUNT_SHIFT,
    MERGED,
    PAGE_SHIFT,
    PARTNER,
    SAMPLE_SHIFT,
    SETTLED,
    ZERO,
    map_count_of,
    page_of,
)

Array = np.ndarray[Any, np.dtype[Any]]

DONE: Final = SETTLED | MERGED | PARTNER
FLAGS: Final = [
    0, DEEP, DEEP | SETTLED, PARTNER, DEEP | PARTNER, MERGED, DEEP | MERGED, DEEP | MERGED | FULL,
    HUGE | DEEP, ZERO | DEEP,
]  # fmt: skip
WORDS: Final = st.lists(
    st.builds(
        lambda sample, full, map_count, flags: (
            sample << SAMPLE_SHIFT
            | (full << 24 if flags & DEEP else 0)
            | map_count << MAP_COUNT_SHIFT
            | flags
        ),
        st.sampled_from([0, 1, 2, 1 << 13, 1 << 27]),
        st.integers(0, 1),
        st.sampled_from([1, 1, 1, 2, 255]),
        st.sampled_from(FLAGS) | st.sampled_from([0, DEEP, DEEP | SETTLED]),
    ),
    max_size=60,
)


def map_count(word: int) -> int:
    return word >> MAP_COUNT_SHIFT & 255


def hopeful(words: list[int], checksum: Callable[[int], int]) -> set[int]:
    """Return which words, but for merged ones, are in groups whose merge frees frames."""
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for index, word in enumerate(words):
        groups[checksum(word)].append(index)
    chosen = set[int]()
    for members in groups.values():
        open_ones = [index for index in members if not words[index] & MERGED]
        counts = Counter(map_count(words[index]) for index in open_ones)
        frees = {count: 0 if count == 255 else pages // count for count, pages in counts.items()}
        anchored = any(words[index] & (MERGED | FULL) == MERGED for index in members)
        if sum(frees.values()) > (0 if anchored else 1):
            chosen.update(index for index in open_ones if frees[map_count(words[index])])
    return chosen


def pages_of(words: list[int], chosen: set[int]) -> set[int]:
    return {words[index] >> PAGE_SHIFT & 511 for index in chosen}


@settings(max_examples=300)
@given(WORDS, st.booleans(), st.none() | st.sets(st.sampled_from([0, 1 << 1, 1 << 15])))
def test_pages_are_marked_and_nominated_as_the_model_says(
    words: list[int], samples: bool, few: set[int] | None
) -> None:
    words = [word | page << PAGE_SHIFT for page, word in enumerate(words)]
    regions = Regions()
    regions.replace(np.array([7], dtype=np.uint64))
    regions.words[0] = bytearray(np.array(words, dtype=np.uint64).tobytes())
    regions.rows["pages"] = len(words)
    marked: list[int] = []
    heads = Heads()
    heads.add(None if few is None else np.array(sorted(few), dtype=np.uint16))

    def mark(found: Array, place: Array) -> None:
        del place
        marked.extend(page_of(found).tolist())

    groups: list[Array] = list(nominate([regions], None, mark, samples, heads.table()))

    usable = [w for w in words if not w & (ZERO | HUGE) and w & (MERGED | DEEP) != MERGED]
    if few is not None:
        usable = [word for word in usable if word >> 48 in few]
    deep = [word for word in usable if word & DEEP]
    told = [word for word in deep if word & (SETTLED | MERGED)]
    by_sample, in_full = hopeful(usable, lambda w: w >> SAMPLE_SHIFT), hopeful(deep, checksum)
    expected = pages_of(deep, {index for index in in_full if not deep[index] & DONE})
    if samples:
        first = {index for index in by_sample if not usable[index] & (DONE | DEEP)}
        expected |= pages_of(usable, first)
    assert sorted(marked) == sorted(expected)
    nominated = [page for each in groups for page in each["page"][~each["anchor"]].tolist()]
    assert sorted(nominated) == sorted(pages_of(told, hopeful(told, checksum)))
    of_page = {word >> PAGE_SHIFT & 511: word for word in words}
    for each in groups:
        checksums = {(row["group"], checksum(of_page[row["page"]])) for row in each}
        assert len(checksums) == len(set(each["group"].tolist())), "a group is of one content"
        chosen = np.array([of_page[page] for page in each["page"].tolist()], dtype=np.uint64)
        assert each["map_count"].tolist() == map_count_of(chosen).tolist()


def checksum(word: int) -> int:
    return word >> 24
