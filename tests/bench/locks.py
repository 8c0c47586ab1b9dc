# SPDX-License-Identifier: MIT
"""How long locks were held, from what the tracer wrote about one process.

A spin lock is timed from before it is waited for until just before it is released, so these are
upper bounds; each event costs something too, which counts as part of what it measures.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

# "  replay-123  [000] d..1.  12.345678: lock: (_raw_spin_lock+0x0/0x30) lock=0x1 caller=..."
_LINE = re.compile(r"\s(\d+\.\d+): (\w+): (.*)")
_FIELD = re.compile(r"(\w+)=(\S+)")
# Who takes page-table locks: the module where that is inline, else this function for everybody.
_TABLE_LOCKERS = re.compile(r"\[mergemem\]|pte_offset_map_\w*lock")

MMAP_LOCK, TABLE_LOCK = "mmap_lock", "page-table lock"


@dataclass(frozen=True)
class Held:
    """How long a kind of lock was held."""

    times: int
    median_us: float
    p99_us: float
    longest_us: float


def read(trace: Path) -> dict[str, Held]:
    """Each kind of lock in a trace; a kind that was never held is missing."""
    durations: dict[str, list[float]] = defaultdict(list)
    since: dict[str, tuple[float, str]] = {}
    for line in trace.read_text(encoding="ascii", errors="replace").splitlines():
        if not (found := _LINE.search(line)):
            continue
        seconds, event, rest = float(found[1]), found[2], found[3]
        fields = dict(_FIELD.findall(rest))
        if event == "mmap_lock_acquire_returned" and fields["success"] == "true":
            since[fields["mm"]] = seconds, MMAP_LOCK
        elif event == "lock" and _TABLE_LOCKERS.search(rest):
            since[fields["lock"]] = seconds, TABLE_LOCK
        elif event in ("mmap_lock_released", "unlock"):
            begun, kind = since.pop(fields["lock" if event == "unlock" else "mm"], (0.0, ""))
            if kind:
                durations[kind].append((seconds - begun) * 1e6)
    return {kind: _held(found) for kind, found in durations.items()}


def _held(durations: list[float]) -> Held:
    ordered = sorted(durations)
    p99 = ordered[-(-len(ordered) * 99 // 100) - 1]
    return Held(len(ordered), ordered[len(ordered) // 2], p99, ordered[-1])
