# SPDX-License-Identifier: MIT
"""Which page frames processes use: pagemap, kpagecount, kpageflags.

Sources: Documentation/admin-guide/mm/pagemap.rst, include/uapi/linux/kernel-page-flags.h.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

PAGE_BYTES = 4096
FRAME_BITS = np.uint64((1 << 55) - 1)
FILE_OR_SHARED = np.uint64(1 << 61)
SWAPPED = np.uint64(1 << 62)
PRESENT = np.uint64(1 << 63)

KPF_UPTODATE, KPF_LRU, KPF_SLAB, KPF_BUDDY, KPF_MMAP, KPF_ANON = 3, 5, 7, 10, 11, 12
KPF_SWAPCACHE, KPF_COMPOUND_HEAD, KPF_COMPOUND_TAIL = 13, 15, 16
KPF_HWPOISON, KPF_KSM, KPF_THP, KPF_ZERO_PAGE = 19, 21, 22, 24
FLAGS_READ_BYTES = 1 << 20

Words = npt.NDArray[np.uint64]


class _HasFrame(Protocol):
    @property
    def frame(self) -> int: ...


def pagemap(pid: int, address: int, pages: int) -> Words:
    """The raw pagemap entries of a range."""
    return _read(f"/proc/{pid}/pagemap", address // PAGE_BYTES, pages)


def of(pid: int, address: int, pages: int) -> Words:
    """The frame number of each page of a range; 0 where no frame is mapped."""
    entries = pagemap(pid, address, pages)
    return np.where(entries & PRESENT != 0, entries & FRAME_BITS, np.uint64(0))


def swapped(pid: int, address: int, pages: int) -> npt.NDArray[np.bool_]:
    """Which pages of a range are on swap."""
    return np.asarray(pagemap(pid, address, pages) & SWAPPED != 0)


def map_count(frame: int) -> int:
    """How many page-table entries map a frame."""
    return int(_read("/proc/kpagecount", frame, 1)[0])


def has_flag(frame: int, flag: int) -> bool:
    """Whether a frame has one of the KPF flags."""
    return bool(int(_read("/proc/kpageflags", frame, 1)[0]) >> flag & 1)


def all_flags() -> Words:
    """The KPF flags of each frame that there is."""
    parts = []
    with Path("/proc/kpageflags").open("rb", buffering=0) as file:
        while part := file.read(FLAGS_READ_BYTES):
            parts.append(part)
    return np.frombuffer(b"".join(parts), dtype=np.uint64)


def have_any(flags: Words, *wanted: int) -> npt.NDArray[np.bool_]:
    """Which frames have at least one of some KPF flags."""
    return np.asarray(flags & np.uint64(sum(1 << flag for flag in wanted)) != 0)


def assert_distinct(pages: Iterable[_HasFrame]) -> None:
    """Each page has a frame, and no two the same."""
    found = [page.frame for page in pages]
    assert all(found), f"not all pages are in memory: {found}"
    assert len(set(found)) == len(found), f"some pages share a frame: {found}"


def assert_shared(pages: Iterable[_HasFrame]) -> int:
    """All pages have one and the same frame, which they alone map; its number."""
    listed = list(pages)
    found = {page.frame for page in listed}
    assert len(found) == 1, f"not one frame: {found}"
    frame = found.pop()
    assert frame, "not in memory"
    assert map_count(frame) == len(listed)
    assert not has_flag(frame, KPF_ANON), "a merged page is nobody's anonymous page"
    return frame


def _read(path: str, first: int, count: int) -> Words:
    """64-bit words of a file, from a position counted in words."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        data = os.pread(descriptor, count * 8, first * 8)
    finally:
        os.close(descriptor)
    assert len(data) == count * 8, f"{path}: {len(data)} bytes at word {first}"
    return np.frombuffer(data, dtype=np.uint64)
