# SPDX-License-Identifier: MIT
"""The arithmetic of the census against a naive model, and the checksum that it rests on."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mergemem_agent import tally
from mergemem_agent.checksum import WORDS_PER_PAGE, Checksum
from mergemem_agent.pagemap import (
    EXCLUSIVE,
    NOT_ANONYMOUS,
    PRESENT,
    FrameFlag,
    Kind,
    Words,
    kinds_of,
)
from mergemem_agent.tally import Tally


@dataclass(frozen=True)
class Frame:
    """A frame as the model sees it: content 0 is zeros; `unseen` mappings are not selected."""

    content: int
    kind: Kind
    processes: tuple[int, ...]
    unseen: int


def frames() -> st.SearchStrategy[list[Frame]]:
    return st.lists(
        st.builds(
            Frame,
            content=st.integers(0, 4),
            kind=st.sampled_from([kind for kind in Kind if kind is not Kind.ZERO_PAGE]),
            processes=st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple),
            unseen=st.sampled_from([0, 0, 0, 1, 2]),
        ),
        max_size=40,
    )


def records(model: list[Frame]) -> tally.Pages:
    """Return a record for each seen mapping, in the order of processes, as the census does."""
    found = [np.empty(0, dtype=tally.PAGE)]
    for process in range(4):
        for number, frame in enumerate(model):
            for _ in range(frame.processes.count(process)):
                exclusive = len(frame.processes) + frame.unseen == 1
                # Contents that differ in one lane only, whichever, are different contents.
                low, high = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 1)][frame.content]
                found.append(
                    tally.pack(
                        np.array([low], dtype=np.uint64),
                        np.array([high], dtype=np.uint64),
                        np.array([number], dtype=np.uint64),
                        process,
                        np.array([exclusive]),
                        np.array([frame.kind], dtype=np.uint8),
                    )
                )
    return np.concatenate(found)


def naive(model: list[Frame]) -> Tally:
    """Count as one would by hand."""

    def number(kind: Kind) -> int:
        return sum(frame.kind is kind for frame in model)

    by_content: dict[int, list[Frame]] = defaultdict(list)
    huge: dict[int, int] = defaultdict(int)
    for frame in model:
        if frame.content and frame.kind in (Kind.ORDINARY, Kind.MERGED):
            by_content[frame.content].append(frame)
        if frame.content and frame.kind is Kind.HUGE:
            huge[frame.content] += 1
    merged = [frame for frame in model if frame.kind is Kind.MERGED]
    zero = sum(frame.kind is Kind.ORDINARY and not frame.content for frame in model)
    result = Tally(
        mapped=sum(len(frame.processes) for frame in model),
        frames=len(model),
        ordinary=number(Kind.ORDINARY) - zero,
        merged=len(merged),
        merged_mappings=sum(len(frame.processes) for frame in merged),
        zero=zero,
        huge=number(Kind.HUGE),
        ksm=number(Kind.KSM),
        other=number(Kind.OTHER),
        shared=sum(len(frame.processes) + frame.unseen > 1 for frame in model),
    )
    for content in {*by_content, *huge}:
        same = by_content[content]
        # Nobody asks who else holds the only frame of its content: there is no duplicate of it.
        inside = same if len(same) == 1 else [frame for frame in same if not frame.unseen]
        owners = {min(frame.processes) for frame in inside}
        duplicates = max(0, len(inside) - 1)
        result += Tally(
            held_elsewhere=len(same) - len(inside),
            contents=int(bool(inside)),
            duplicates_within=len(inside) - len(owners),
            duplicates_between=max(0, len(owners) - 1),
            huge_duplicates=max(0, len(inside) + huge[content] - 1) - duplicates,
            squares=duplicates**2,
        )
    return result


@given(frames())
def test_counts_as_the_naive_model(model: list[Frame]) -> None:
    def counts(asked: Words) -> Words:
        held = [len(model[int(n)].processes) + model[int(n)].unseen for n in asked]
        return np.array(held, dtype=np.uint64)

    assert tally.count(records(model), counts) == naive(model)


@given(frames())
def test_frames_are_all_of_some_kind(model: list[Frame]) -> None:
    counted = tally.count(records(model), None)
    assert counted.frames == (
        counted.ordinary
        + counted.merged
        + counted.zero
        + counted.huge
        + counted.ksm
        + counted.other
    )
    assert counted.mergeable_duplicates <= counted.ordinary + counted.merged


@given(frames(), st.integers(2, 5))
def test_parts_of_contents_add_up(model: list[Frame], parts: int) -> None:
    pages = records(model)
    split = [pages[(pages["low"] + pages["high"]) % np.uint64(parts) == n] for n in range(parts)]
    assert sum((tally.count(part, None) for part in split), Tally()) == tally.count(pages, None)


def test_without_counts_a_lone_mapping_of_a_shared_frame_is_held_elsewhere() -> None:
    model = [
        Frame(1, Kind.ORDINARY, (0,), unseen=1),
        Frame(1, Kind.ORDINARY, (0, 1), unseen=1),
        Frame(1, Kind.ORDINARY, (1,), unseen=0),
    ]
    counted = tally.count(records(model), None)
    assert counted.held_elsewhere == 1
    assert counted.mergeable_duplicates == 1


def test_kinds_by_pagemap_alone() -> None:
    entries = np.array([PRESENT | EXCLUSIVE, PRESENT | NOT_ANONYMOUS], dtype=np.uint64)
    assert kinds_of(entries, None).tolist() == [Kind.ORDINARY, Kind.MERGED]


def test_kinds_by_flags() -> None:
    anon, mapped, lru = FrameFlag.ANON, 1 << 11, 1 << 5
    cases = [
        (False, anon | mapped | lru, Kind.ORDINARY),
        (True, mapped, Kind.MERGED),
        (False, anon | FrameFlag.COMPOUND_HEAD | FrameFlag.THP, Kind.HUGE),
        (False, anon | FrameFlag.COMPOUND_TAIL, Kind.HUGE),  # any large folio, THP or not
        (False, anon | FrameFlag.KSM, Kind.KSM),
        (False, FrameFlag.ZERO_PAGE, Kind.ZERO_PAGE),
        (True, FrameFlag.ZERO_PAGE | FrameFlag.THP | FrameFlag.COMPOUND_HEAD, Kind.ZERO_PAGE),
        (False, 0, Kind.OTHER),  # freed between the two looks
        (True, anon, Kind.OTHER),
    ]
    entries = [PRESENT | NOT_ANONYMOUS if named else PRESENT for named, _, _ in cases]
    flags = np.array([int(flag) for _, flag, _ in cases], dtype=np.uint64)
    kinds = kinds_of(np.array(entries, dtype=np.uint64), flags)
    assert kinds.tolist() == [kind for _, _, kind in cases]


def test_a_flag_that_every_page_has_says_nothing() -> None:
    entries = np.array([PRESENT], dtype=np.uint64)
    flags = np.array([int(FrameFlag.ANON | FrameFlag.KSM)], dtype=np.uint64)
    assert kinds_of(entries, flags, FrameFlag.KSM).tolist() == [Kind.ORDINARY]


# --- checksum ------------------------------------------------------------------------------------


def page_arrays() -> st.SearchStrategy[Words]:
    words = st.sampled_from([0, 1, 1 << 31, 1 << 32, 1 << 63, 2**64 - 1])
    return arrays(np.uint64, (4, WORDS_PER_PAGE), elements=words, fill=st.just(0))


@given(page_arrays())
def test_checksums_are_the_multilinear_hash(pages: Words) -> None:
    checksum = Checksum()
    a, b, c, d = ([int(w) for w in row] for row in checksum._weights)
    for page, low, high in zip(pages, *checksum.of(pages), strict=True):
        words = [int(word) for word in page]
        for lane, x_weights, h_weights in ((low, a, b), (high, c, d)):
            total = sum(w * x for w, x in zip(x_weights, words, strict=True))
            total += sum(w * (x >> 32) for w, x in zip(h_weights, words, strict=True))
            assert int(lane) == total % 2**64


@given(page_arrays())
def test_checksums_are_equal_only_for_equal_pages(pages: Words) -> None:
    low, high = Checksum().of(pages)
    for i in range(len(pages)):
        for j in range(i):
            same = bool((pages[i] == pages[j]).all())
            assert same == (low[i] == low[j] and high[i] == high[j])


def test_sign_bits_do_not_cancel() -> None:
    # Words that differ in their top bits only: a hash by whole words loses every second pair.
    pages = np.zeros((128, WORDS_PER_PAGE), dtype=np.uint64)
    for row in range(1, 128):
        pages[row, [row, row + 1]] = np.uint64(1 << 63)
    low, _ = Checksum().of(pages)
    assert len(np.unique(low)) == 128


def test_only_zeros_have_checksum_zero() -> None:
    pages = np.zeros((WORDS_PER_PAGE + 1, WORDS_PER_PAGE), dtype=np.uint64)
    np.fill_diagonal(pages, np.uint64(1 << 63))
    low, high = Checksum().of(pages)
    assert np.flatnonzero((low | high) == 0).tolist() == [WORDS_PER_PAGE]


def test_two_draws_have_nothing_in_common() -> None:
    pages = np.ones((1, WORDS_PER_PAGE), dtype=np.uint64)
    assert Checksum().of(pages)[0] != Checksum().of(pages)[0]
