# SPDX-License-Identifier: MIT
"""Where memory is: frames that are free, and those that processes have."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np

from tests.kernel import frames

# Readings that agree this well are what the system settled at.
STEADY_PAGES = 200
STEADY_SECONDS = 0.5
DEADLINE_SECONDS = 60.0
# Page cache is on a list; the rest is not made of single pages, or free.
KNOWN_USERS = (
    frames.KPF_LRU,
    frames.KPF_SLAB,
    frames.KPF_BUDDY,
    frames.KPF_COMPOUND_HEAD,
    frames.KPF_COMPOUND_TAIL,
)


def free_pages() -> int:
    """Frames that nobody uses.

    MemFree leaves out those that wait in per-CPU lists, tens of MiB on newer kernels.
    """
    Path("/proc/sys/vm/drop_caches").write_text("3")
    found = re.search(r"MemFree: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert found
    lists = re.findall(r"^ +count: +(\d+)$", Path("/proc/zoneinfo").read_text(), re.MULTILINE)
    assert lists
    return int(found[1]) // 4 + sum(map(int, lists))


def settled_free_pages() -> int:
    """The same, once it is steady: the end of earlier processes finishes in the background."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    readings = [free_pages()]
    while len(readings) < 3 or max(readings[-3:]) - min(readings[-3:]) > STEADY_PAGES:
        assert time.monotonic() < deadline, f"free memory does not settle: {readings[-5:]}"
        time.sleep(STEADY_SECONDS)
        readings.append(free_pages())
    return readings[-1]


def forgotten_frames() -> list[int]:
    """Frames that hold a page of a process, or a shared one, though no process maps it any more.

    So somebody has a reference. Pages of processes tell what they are until they are freed; a
    shared one has content, and no user that the kernel knows of.
    """
    # What is on its way to a list of the kernel gets there.
    Path("/proc/sys/vm/compact_memory").write_text("1")
    flags = frames.all_flags()
    # Poisoned ones stay for good.
    innocent = frames.have_any(flags, frames.KPF_MMAP, frames.KPF_HWPOISON)
    anonymous = frames.have_any(flags, frames.KPF_ANON)
    content = frames.have_any(flags, frames.KPF_UPTODATE)
    known = frames.have_any(flags, *KNOWN_USERS)
    return [int(frame) for frame in np.flatnonzero(~innocent & (anonymous | content & ~known))]
