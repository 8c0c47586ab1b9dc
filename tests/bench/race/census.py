# SPDX-License-Identifier: MIT
"""The exact census: how many page frames the processes' anonymous memory would need at least.

Every page that is in memory is read and reduced to 64 bits, by a product with random odd numbers:
two pages that differ have the same with a probability of about 2^-61. Nobody may write meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.demo import frames
from tests.demo.frames import PAGE_BYTES

WORDS = PAGE_BYTES // 8
AT_ONCE_PAGES = 2048
_MULTIPLIERS = np.random.default_rng().integers(2**63, size=WORDS, dtype=np.uint64) * 2 + 1


@dataclass(frozen=True)
class Census:
    """What is mapped, and what it takes to hold it."""

    mappings: int  # page-table entries, those of the kernel's zero page among them
    contents: int  # different pages; those of zeros count as none, as the kernel has one


def take(pids: Iterable[int]) -> Census:
    """Read all private anonymous memory of the processes."""
    parts = [part for pid in pids for part in _contents(pid)]
    found = np.concatenate(parts) if parts else np.empty(0, np.uint64)
    return Census(found.size, int(np.unique(found[found != 0]).size))


def checksums(data: bytes) -> npt.NDArray[np.uint64]:
    """64 bits for each page; 0 for a page of zeros."""
    return np.frombuffer(data, np.uint64).reshape(-1, WORDS) @ _MULTIPLIERS


def _contents(pid: int) -> Iterator[npt.NDArray[np.uint64]]:
    with (
        open(f"/proc/{pid}/mem", "rb", buffering=0) as memory,
        open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap,
    ):
        for start, end in frames.anonymous(pid):
            for address in range(start, end, AT_ONCE_PAGES * PAGE_BYTES):
                stop = min(end, address + AT_ONCE_PAGES * PAGE_BYTES)
                size = (stop - address) // PAGE_BYTES * frames.ENTRY_BYTES
                offset = address // PAGE_BYTES * frames.ENTRY_BYTES
                entries = np.frombuffer(os.pread(pagemap.fileno(), size, offset), np.uint64)
                present = (entries & frames.PRESENT) != 0
                # Reading what is not there would map the zero page.
                for first, last in _runs(present):
                    at, length = address + first * PAGE_BYTES, (last - first) * PAGE_BYTES
                    yield checksums(os.pread(memory.fileno(), length, at))


def _runs(chosen: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], chosen, [False])).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
