# SPDX-License-Identifier: MIT
"""Exact counting of the frames behind processes' anonymous memory, through /proc/PID/pagemap.

Frame numbers are for CAP_SYS_ADMIN only. Format of an entry: Documentation/admin-guide/mm/
pagemap.rst; bits 0-54 are the frame number, 61 says not anonymous, 62 swapped, 63 present.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

PAGE_BYTES = 4096
ENTRY_BYTES = 8
FRAME = np.uint64((1 << 55) - 1)
NOT_ANONYMOUS = np.uint64(1 << 61)
SWAPPED = np.uint64(1 << 62)
PRESENT = np.uint64(1 << 63)

Entries = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Frames:
    """What the private anonymous mappings of some processes take."""

    frames: int  # distinct frames, each counted once
    mappings: int  # page-table entries that map them
    merged_mappings: int  # those whose frame is not an anonymous one: merged pages
    zero_mappings: int  # page-table entries that map the kernel's zero page; no frame
    swapped_pages: int

    @property
    def bytes(self) -> int:
        return self.frames * PAGE_BYTES


def count(pids: Iterable[int]) -> Frames:
    """Count what the processes hold together. One that has gone holds nothing."""
    parts = [entries for pid in pids for entries in _entries(pid)]
    entries = np.concatenate(parts) if parts else np.empty(0, np.uint64)
    present = entries[(entries & PRESENT) != 0]
    frames = present & FRAME
    zero = frames == _zero_frame()
    # The module's shared pages are the only ones in private anonymous mappings that are not
    # anonymous, beside the zero page.
    merged = ((present & NOT_ANONYMOUS) != 0) & ~zero
    return Frames(
        frames=int(np.unique(frames[~zero]).size),
        mappings=int(np.count_nonzero(~zero)),
        merged_mappings=int(np.count_nonzero(merged)),
        zero_mappings=int(np.count_nonzero(zero)),
        swapped_pages=int(np.count_nonzero(entries & SWAPPED)),
    )


def huge_bytes(pids: Iterable[int]) -> int:
    """How much of the processes' memory is mapped as huge pages."""
    kib = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup", encoding="ascii", errors="replace") as rollup:
                kib += sum(
                    int(line.split()[1]) for line in rollup if line.startswith("AnonHugePages:")
                )
        except (FileNotFoundError, ProcessLookupError):
            continue
    return kib * 1024


def _entries(pid: int) -> Iterator[Entries]:
    try:
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
            for start, end in anonymous(pid):
                pagemap.seek(start // PAGE_BYTES * ENTRY_BYTES)
                found = np.frombuffer(_read(pagemap.fileno(), start, end), np.uint64)
                yield found[(found & (PRESENT | SWAPPED)) != 0]
    except (FileNotFoundError, ProcessLookupError):
        return


def _read(descriptor: int, start: int, end: int) -> bytes:
    return os.read(descriptor, (end - start) // PAGE_BYTES * ENTRY_BYTES)


def anonymous(pid: int) -> Iterator[tuple[int, int]]:
    """The private anonymous mappings; the heap and the stack are among them."""
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            addresses, permissions, _, _, inode, *name = line.split(maxsplit=5)
            if permissions[3] != "p" or inode != "0" or (name and name[0].startswith("[v")):
                continue  # [vvar], [vdso], [vsyscall]
            start, end = addresses.split("-")
            yield int(start, 16), int(end, 16)


@cache
def _zero_frame() -> np.uint64:
    """The number of the kernel's zero page: what a page that was only read is mapped to."""
    with mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        _ = memory[0]
        # NumPy tells where the memory is; ctypes would want it writable, which is a fault too.
        address = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(address // PAGE_BYTES * ENTRY_BYTES)
            entry = np.frombuffer(pagemap.read(ENTRY_BYTES), np.uint64)[0]
    return np.uint64(entry & FRAME)
