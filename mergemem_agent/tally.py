# SPDX-License-Identifier: MIT
"""Counting equal frames: the arithmetic of the census, without any reading.

Each page of a process is one record of 24 bytes: its checksum (128 bits) and a tag,

    frame (40 bits) | process (20) | exclusive (1) | Kind (3)

from which sorting by (checksum, tag) puts equal contents together, within them the mappings of one
frame, and first among those the mapping of the process that comes first in the selection.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from mergemem_agent.pagemap import Kind, Kinds, Words

PAGE = np.dtype([("low", np.uint64), ("high", np.uint64), ("tag", np.uint64)])
Pages = NDArray[np.void]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

FRAME_BITS = 40  # 52 bits of physical address
PROCESS_BITS = 20
_KIND_BITS = 3
_EXCLUSIVE_SHIFT = np.uint64(_KIND_BITS)
_PROCESS_SHIFT = np.uint64(_KIND_BITS + 1)
_FRAME_SHIFT = np.uint64(_KIND_BITS + 1 + PROCESS_BITS)


@dataclass(frozen=True)
class Tally:
    """What equal contents there are among processes that may share pages. All in pages of 4 KiB.

    frames = ordinary + merged + zero + huge + ksm + other. Only `ordinary` and `merged` frames
    count as duplicates, and only those that no process outside of the selection maps too:
    merging takes a frame away from the selected processes, and frees it if that was all.
    """

    mapped: int = 0  # page-table entries; a frame has one for each process that maps it
    frames: int = 0
    ordinary: int = 0  # small, anonymous and not filled with zeros
    merged: int = 0  # shared by mergemem
    merged_mappings: int = 0  # page-table entries of these
    zero: int = 0  # small, anonymous, and filled with zeros
    huge: int = 0  # within huge pages or large folios, whatever they hold
    ksm: int = 0
    other: int = 0
    shared: int = 0  # frames that have more than one mapping, in the selection or not
    held_elsewhere: int = 0  # duplicates that stay in use by processes that are not selected
    contents: int = 0  # distinct contents of the frames that can be freed
    duplicates_within: int = 0  # equal to another frame of the same process
    duplicates_between: int = 0  # equal to a frame of another process only
    huge_duplicates: int = 0  # would be duplicates too if huge pages were split
    squares: int = 0  # sum over contents of duplicates squared: for the sampling error

    @property
    def mergeable_duplicates(self) -> int:
        """Frames that merging would free: those that can be freed minus distinct contents."""
        return self.duplicates_within + self.duplicates_between

    @property
    def saved(self) -> int:
        """Frames that sharing saves now: mappings beyond the first of each frame."""
        return self.mapped - self.frames

    def __add__(self, other: "Tally") -> "Tally":
        """Add up tallies of disjoint sets of contents."""
        names = [field.name for field in fields(self)]
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def scaled(self, factor: float) -> "Tally":
        """Extrapolate from a sample of contents to all of them."""
        names = [field.name for field in fields(self)]
        return Tally(**{name: round(getattr(self, name) * factor) for name in names})


def pack(
    low: Words, high: Words, frames: Words, process: int, exclusive: Flags, kinds: Kinds
) -> Pages:
    """Make records of pages of one process, which is given by its number in the selection."""
    pages = np.empty(len(low), dtype=PAGE)
    pages["low"] = low
    pages["high"] = high
    tags = frames << _FRAME_SHIFT
    tags |= np.uint64(process) << _PROCESS_SHIFT
    tags |= exclusive.astype(np.uint64) << _EXCLUSIVE_SHIFT
    tags |= kinds.astype(np.uint64)
    pages["tag"] = tags
    return pages


def is_zero(pages: Pages) -> Flags:
    """Tell which pages hold nothing but zeros: see checksum.py."""
    zero: Flags = (pages["low"] | pages["high"]) == 0
    return zero


def frames_of(pages: Pages) -> Words:
    """Return the frame number of each record."""
    frames: Words = pages["tag"] >> _FRAME_SHIFT
    return frames


def shared_frames(pages: Pages) -> Words:
    """Return the numbers of all frames that have more than one mapping, each once."""
    tags = pages["tag"]
    exclusive = (tags >> _EXCLUSIVE_SHIFT) & np.uint64(1)
    return np.unique(tags[exclusive == 0] >> _FRAME_SHIFT)


class _Frames:
    """The records of each frame made one: arrays over frames, equal contents side by side."""

    def __init__(self, pages: Pages) -> None:
        order = np.lexsort((pages["tag"], pages["high"], pages["low"]))
        pages = pages[order]
        tags = pages["tag"]
        new_content = np.ones(len(pages), dtype=np.bool_)
        new_content[1:] = pages["low"][1:] != pages["low"][:-1]
        new_content[1:] |= pages["high"][1:] != pages["high"][:-1]
        new_frame = new_content.copy()
        new_frame[1:] |= (tags[1:] >> _FRAME_SHIFT) != (tags[:-1] >> _FRAME_SHIFT)
        first = np.flatnonzero(new_frame)
        tags = tags[first]
        self.mappings: Integers = np.diff(first, append=len(pages))
        self.content: Integers = np.cumsum(new_content)[first] - 1
        self.contents = int(new_content.sum())
        self.zero = is_zero(pages[first])
        self.number: Words = tags >> _FRAME_SHIFT
        self.process = ((tags >> _PROCESS_SHIFT) & np.uint64((1 << PROCESS_BITS) - 1)).astype(int)
        self.exclusive = ((tags >> _EXCLUSIVE_SHIFT) & np.uint64(1)) == 1
        self.kind = (tags & np.uint64((1 << _KIND_BITS) - 1)).astype(np.uint8)

    def per_content(self, chosen: Flags) -> Integers:
        """Count the chosen frames of each content."""
        return np.bincount(self.content[chosen], minlength=self.contents)

    def owners_per_content(self, chosen: Flags) -> Integers:
        """Count the processes among which the chosen frames of each content are spread.

        A frame that several processes map belongs to the first of them.
        """
        pairs = np.unique((self.content[chosen] << PROCESS_BITS) | self.process[chosen])
        return np.bincount(pairs >> PROCESS_BITS, minlength=self.contents)


MappingCounts = Callable[[Words], Words]


def count(pages: Pages, mapping_counts: MappingCounts | None) -> Tally:
    """Count the frames behind `pages`, an array of PAGE, and the duplicates among them.

    `mapping_counts` returns how many mappings frames have in the whole system. Without it, a
    frame of which two mappings are seen is taken to have no others.
    """
    frames = _Frames(pages)
    kind, zero = frames.kind, frames.zero
    ordinary = (kind == Kind.ORDINARY) & ~zero
    merged = kind == Kind.MERGED
    huge = kind == Kind.HUGE
    mergeable = ordinary | (merged & ~zero)  # zeros are counted apart, whoever shares them
    repeated = mergeable & (frames.per_content(mergeable) > 1)[frames.content]
    elsewhere = np.zeros(len(kind), dtype=np.bool_)
    elsewhere[repeated] = _mapped_elsewhere(frames, repeated, mapping_counts)

    per_content = frames.per_content(mergeable & ~elsewhere)
    owners = frames.owners_per_content(mergeable & ~elsewhere)
    duplicates = _beyond_first(per_content)
    huge_per_content = frames.per_content(huge & ~zero)
    return Tally(
        mapped=len(pages),
        frames=len(kind),
        ordinary=int(ordinary.sum()),
        merged=int(merged.sum()),
        merged_mappings=int(frames.mappings[merged].sum()),
        zero=int(((kind == Kind.ORDINARY) & zero).sum()),
        huge=int(huge.sum()),
        ksm=int((kind == Kind.KSM).sum()),
        other=int((kind == Kind.OTHER).sum()),
        shared=int((~frames.exclusive).sum()),
        held_elsewhere=int(elsewhere.sum()),
        contents=int((per_content > 0).sum()),
        duplicates_within=int((per_content - owners).sum()),
        duplicates_between=int(_beyond_first(owners).sum()),
        huge_duplicates=int((_beyond_first(per_content + huge_per_content) - duplicates).sum()),
        squares=int((duplicates.astype(np.float64) ** 2).sum()),
    )


def _beyond_first(numbers: Integers) -> Integers:
    return np.maximum(numbers - 1, 0)


def _mapped_elsewhere(frames: _Frames, asked: Flags, mapping_counts: MappingCounts | None) -> Flags:
    """Tell which of the frames asked for have mappings that were not seen."""
    seen = frames.mappings[asked]
    if mapping_counts is None:
        unseen: Flags = ~frames.exclusive[asked] & (seen == 1)
        return unseen
    # Not from the exclusive bit: a frame that was forked since then is held by the child too.
    more: Flags = mapping_counts(frames.number[asked]) > seen.astype(np.uint64)
    return more
