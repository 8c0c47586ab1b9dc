# SPDX-License-Identifier: MIT
"""Counters of the kernel that must come back to where they were when nobody is left."""

from __future__ import annotations

import os
import time
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
# Pages that come and go with the soak's own process, in either direction.
SLACK_PAGES = 1024
PATIENCE_SECONDS = 30.0
VMSTAT = ("nr_anon_pages", "nr_mapped", "nr_anon_transparent_hugepages", "nr_mlock")
# Zero whenever nothing is going on.
ZERO = ("nr_isolated_anon", "nr_isolated_file", "dying_cgroups")


def read() -> dict[str, int]:
    """All of them, as of now."""
    # Per-CPU parts are added up; the kernel refuses when a sum is negative.
    values: dict[str, int] = {"negative": 0}
    try:
        Path("/proc/sys/vm/stat_refresh").read_text(encoding="utf-8")
    except OSError:
        values["negative"] = 1
    for line in Path("/proc/vmstat").read_text(encoding="utf-8").splitlines():
        name, value = line.split()
        if name in VMSTAT or name in ZERO:
            values[name] = int(value)
    # Our own grow with what we import.
    values["nr_anon_pages"] -= _own_anon_pages()
    stat = dict(
        line.split() for line in (CGROUPS / "cgroup.stat").read_text(encoding="utf-8").splitlines()
    )
    values["cgroups"] = int(stat["nr_descendants"])
    values["dying_cgroups"] = int(stat["nr_dying_descendants"])
    return values


def _own_anon_pages() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(kib) * 1024 // os.sysconf("SC_PAGE_SIZE")


def astray(before: dict[str, int], after: dict[str, int]) -> dict[str, str]:
    """Those that have not come back, and how far they are off."""
    wrong = {}
    for name, value in after.items():
        expected = 0 if name in (*ZERO, "negative") else before[name]
        slack = SLACK_PAGES if name in VMSTAT else 0
        if abs(value - expected) > slack:
            wrong[name] = f"{value} instead of {expected}"
    return wrong


def settled(before: dict[str, int]) -> tuple[dict[str, int], dict[str, str]]:
    """Counters, and those astray, once the end of processes and groups has been worked off."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        after = read()
        wrong = astray(before, after)
        if not wrong or time.monotonic() > deadline:
            return after, wrong
        time.sleep(2)
