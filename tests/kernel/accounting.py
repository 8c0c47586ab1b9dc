# SPDX-License-Identifier: MIT
"""Where memory is: frames that are free, and those that processes have."""

from __future__ import annotations

import re
from pathlib import Path


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
