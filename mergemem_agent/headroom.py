# SPDX-License-Identifier: MIT
"""Whether memory suffices for frames that processes are to get: of the host, and of each cgroup."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mergemem_agent.quantity import format_size

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Shortage:
    """One limit that would be broken."""

    what: str
    needed_bytes: int
    left_bytes: int

    def __str__(self) -> str:
        """Say it in one line."""
        missing = format_size(self.needed_bytes - self.left_bytes)
        return (
            f"{self.what} has {format_size(self.left_bytes)} left, "
            f"{format_size(self.needed_bytes)} are needed: {missing} are missing"
        )


def shortages(
    needs: Iterable[tuple[str, int]], proc: Path = PROC, cgroups: Path = CGROUPS
) -> list[Shortage]:
    """Return which limits the needs would break, given as (control group, bytes).

    What a group takes is charged to all groups above it, too.
    """
    by_group: Counter[str] = Counter()
    total_bytes = 0
    for group, needed_bytes in needs:
        total_bytes += needed_bytes
        for path in [PurePosixPath(group), *PurePosixPath(group).parents]:
            by_group[str(path)] += needed_bytes
    found = []
    available_bytes = _available_bytes(proc)
    if total_bytes > available_bytes:
        found.append(Shortage("the host", total_bytes, available_bytes))
    for group in sorted(by_group):
        left_bytes = _left_bytes(cgroups / group.lstrip("/"))
        if left_bytes is not None and by_group[group] > left_bytes:
            found.append(Shortage(f"control group {group}", by_group[group], left_bytes))
    return found


def _available_bytes(proc: Path) -> int:
    meminfo = (proc / "meminfo").read_text(encoding="ascii")
    match = re.search(r"^MemAvailable: +([0-9]+) kB$", meminfo, re.MULTILINE)
    assert match, "/proc/meminfo has MemAvailable since Linux 3.14"
    return int(match[1]) * 1024


def _left_bytes(group: Path) -> int | None:
    """Return what a control group may take yet; None: it has no limit, or is none."""
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        current = (group / "memory.current").read_text(encoding="ascii")
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(current))
