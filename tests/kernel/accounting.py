# SPDX-License-Identifier: MIT
"""Where memory is: frames that are free, and those that processes have."""

from __future__ import annotations

import re
import time
from pathlib import Path

# Readings that agree this well are what the system settled at.
STEADY_PAGES = 200
STEADY_SECONDS = 0.5
DEADLINE_SECONDS = 60.0


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
