# SPDX-License-Identifier: MIT
"""What the kernel tells of pages: /proc/PID/pagemap, /proc/PID/mem, /proc/kpageflags, kpagecount.

Nothing here stops a process or changes its memory, and that is a choice: **process_vm_readv(2)
would be faster, but pins the pages that it reads, and the kernel gives each fork-shared anonymous
page that is pinned a private copy first** (gup_must_unshare(), since a7f226604170 "mm/gup: trigger
FAULT_FLAG_UNSHARE when R/O-pinning a possibly shared anonymous page", v5.19). One such pass over
a prefork fleet would undo all of its sharing. Reading /proc/PID/mem takes plain references: one
page and one short hold of mmap_lock at a time.

Documented in the kernel's Documentation/admin-guide/mm/pagemap.rst and proc_pid_pagemap(5).
"""

import contextlib
import enum
import errno
import itertools
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mergemem_agent.error import ProcessGone

PAGE_BYTES = 4096
WORDS_PER_PAGE = PAGE_BYTES // 8

Words = NDArray[np.uint64]
Kinds = NDArray[np.uint8]

# Entries of /proc/PID/pagemap.
FRAME_MASK = np.uint64((1 << 55) - 1)  # zero without CAP_SYS_ADMIN
EXCLUSIVE = np.uint64(1 << 56)  # this is the frame's only mapping
NOT_ANONYMOUS = np.uint64(1 << 61)  # file page or shared memory; merged pages look so too
SWAPPED = np.uint64(1 << 62)
PRESENT = np.uint64(1 << 63)
# Bits that stay while a page stays; the others (soft-dirty, userfaultfd) come and go beside it.
IDENTITY = FRAME_MASK | NOT_ANONYMOUS | SWAPPED | PRESENT


class FrameFlag(enum.IntFlag):
    """The bits of /proc/kpageflags used here (include/uapi/linux/kernel-page-flags.h)."""

    ANON = 1 << 12
    COMPOUND_HEAD = 1 << 15
    COMPOUND_TAIL = 1 << 16
    HUGE = 1 << 17
    KSM = 1 << 21
    THP = 1 << 22
    ZERO_PAGE = 1 << 24


NO_FLAGS = FrameFlag(0)
LARGE = FrameFlag.COMPOUND_HEAD | FrameFlag.COMPOUND_TAIL | FrameFlag.HUGE | FrameFlag.THP


class Kind(enum.IntEnum):
    """What sort of frame lies behind a page of a private anonymous mapping."""

    ORDINARY = 0  # a small anonymous page: what can be merged
    MERGED = 1  # shared by mergemem already
    HUGE = 2  # part of a huge page or large folio
    KSM = 3  # shared by KSM
    ZERO_PAGE = 4  # the kernel's own page of zeros, small or huge: takes no memory
    OTHER = 5  # a device's page, or a page that went away between two looks


def kinds_of(entries: Words, flags: Words | None, untrue: FrameFlag = NO_FLAGS) -> Kinds:
    """Return the Kind of each present page.

    `entries` are those of pagemap; `flags` those of kpageflags for the same frames, of which
    `untrue` are ignored, or None where it may not be read: then huge pages, KSM's and the kernel's
    zero page look ordinary.
    """
    not_anonymous = (entries & NOT_ANONYMOUS) != 0
    kinds = np.where(not_anonymous, Kind.MERGED, Kind.ORDINARY).astype(np.uint8)
    if flags is None:
        return kinds
    # A merged page is a driver's page in an anonymous mapping, to pagemap and to kpageflags; a
    # frame on which both disagree has changed hands in between.
    kinds[_any(flags, FrameFlag.ANON) == not_anonymous] = Kind.OTHER
    kinds[_any(flags, LARGE)] = Kind.HUGE
    kinds[_any(flags, FrameFlag.KSM & ~untrue)] = Kind.KSM
    kinds[_any(flags, FrameFlag.ZERO_PAGE)] = Kind.ZERO_PAGE
    return kinds


def _any(flags: Words, bits: FrameFlag) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (flags & np.uint64(bits)) != 0
    return found


class AddressSpace:
    """The memory of one process, read while it runs.

    Both descriptors belong to the memory that the process had when they were opened: after exec or
    exit they read as empty, and never show the memory of a newcomer with the same pid.
    """

    def __init__(self, pid: int, proc_root: Path = Path("/proc")) -> None:
        """Open pagemap and mem. Raises PermissionError, ProcessGone."""
        self._descriptors: list[int] = []
        try:
            for name in ("pagemap", "mem"):
                path = proc_root / str(pid) / name
                self._descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except (FileNotFoundError, ProcessLookupError):
            self.close()
            raise ProcessGone(f"there is no process {pid}, or no longer") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the process."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> Self:
        """Use as a context manager."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def entries(self, address: int, pages: int) -> Words:
        """Return the pagemap entries of `pages` pages from `address`. Raises ProcessGone."""
        raw = os.pread(self._descriptors[0], pages * 8, address // PAGE_BYTES * 8)
        if len(raw) < pages * 8:
            raise ProcessGone("the process ended while it was read")
        return np.frombuffer(raw, dtype=np.uint64)

    def read(self, address: int, pages: Words) -> int:
        """Fill `pages`, of shape (n, 512), from `address` on; return how many could be read.

        Only pages that are present should be asked for: reading an absent page maps the zero page
        there, and reading a swapped one brings it in. Raises ProcessGone.
        """
        try:
            count = os.preadv(self._descriptors[1], [pages.data.cast("B")], address)
        except OSError as error:
            if error.errno in (errno.EIO, errno.EFAULT):
                return 0
            raise
        if count == 0:
            raise ProcessGone("the process ended while it was read")
        return count // PAGE_BYTES


class FrameTable:
    """/proc/kpageflags or /proc/kpagecount: one number for each page frame of the machine."""

    # Between two frames that are wanted, up to so many others are read rather than skipped: the
    # kernel takes a few nanoseconds for each, a system call as much as for 64 of them or more.
    _GAP = np.uint64(64)
    _RUN = 4096  # frames wanted in one read at most, which bounds its buffer to 2 MiB

    def __init__(self, path: Path) -> None:
        """Open the file. Raises OSError (root or CAP_DAC_READ_SEARCH is needed)."""
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def values(self, frames: Words) -> Words:
        """Return the number of each frame, in the order of `frames`; 0 for one that is none."""
        distinct, positions = np.unique(frames, return_inverse=True)
        values = np.zeros(len(distinct), dtype=np.uint64)
        gaps = np.flatnonzero(np.diff(distinct) > self._GAP) + 1
        bounds = sorted({*gaps.tolist(), *range(0, len(distinct), self._RUN), len(distinct)})
        for start, end in itertools.pairwise(bounds):
            values[start:end] = self._run(distinct[start:end])
        return values[positions]

    def _run(self, frames: Words) -> Words:
        first, last = int(frames[0]), int(frames[-1])
        raw = os.pread(self._descriptor, (last - first + 1) * 8, first * 8)
        run = np.zeros(last - first + 1, dtype=np.uint64)
        run[: len(raw) // 8] = np.frombuffer(raw, dtype=np.uint64)
        return run[(frames - np.uint64(first)).astype(np.intp)]


def open_frame_table(path: Path) -> FrameTable | None:
    """Open a FrameTable; None where the caller may not, or the kernel has none."""
    try:
        return FrameTable(path)
    except OSError:
        return None


@contextlib.contextmanager
def own_frame() -> Iterator[int]:
    """Hold an ordinary anonymous page; give its frame number, 0 where pagemap hides it."""
    with mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[0] = 1
        address = np.frombuffer(memory, dtype=np.uint8).__array_interface__["data"][0]
        frame = 0
        # A process that is not dumpable may not even look at itself.
        with contextlib.suppress(PermissionError), AddressSpace(os.getpid()) as own:
            frame = int(own.entries(address, 1)[0] & FRAME_MASK)
        yield frame


def frame_numbers_visible() -> bool:
    """Tell whether pagemap shows frame numbers to this process."""
    with own_frame() as frame:
        return frame != 0


def untrue_flags(flags: FrameTable) -> FrameFlag:
    """Return what this kernel claims of every anonymous page, and so tells nothing.

    That is KPF_KSM since dee3d0bef2b0 "proc: rewrite stable_page_flags()" (v6.10), until a fix
    of 2026: it compared with a mask of two bits of which all anonymous pages have one.
    """
    with own_frame() as frame:
        claimed = int(flags.values(np.array([frame], dtype=np.uint64))[0])
        return FrameFlag(claimed & FrameFlag.KSM)
