# SPDX-License-Identifier: MIT
"""How much memory the kernel has free: the second witness, beside the count of frames."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE_BYTES = 4096


@dataclass(frozen=True)
class FreeMemory:
    """Free memory by where the kernel keeps it.

    Since 6.12 or so freed pages may stay by the tens of MiB in lists of each CPU, which MemFree
    does not count: alone it lies.
    """

    mem_free_bytes: int
    per_cpu_lists_bytes: int

    @property
    def bytes(self) -> int:
        return self.mem_free_bytes + self.per_cpu_lists_bytes


def read(proc: Path = Path("/proc")) -> FreeMemory:
    """What is free right now."""
    meminfo = (proc / "meminfo").read_text(encoding="ascii")
    zoneinfo = (proc / "zoneinfo").read_text(encoding="ascii")
    mem_free = re.search(r"^MemFree: +(\d+) kB$", meminfo, re.MULTILINE)
    assert mem_free
    lists = re.findall(r"^ +count: +(\d+)$", zoneinfo, re.MULTILINE)
    return FreeMemory(int(mem_free[1]) * 1024, sum(map(int, lists)) * PAGE_BYTES)


def drop_caches() -> None:
    """Free what is only cached, so that two readings differ by what processes hold alone."""
    Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
