# SPDX-License-Identifier: MIT
"""Interrupts between processors, from /proc/interrupts: to flush TLBs, and to call functions.

On x86 Linux sends flushes of TLBs as function calls, and counts them under both names.
"""

from __future__ import annotations

from pathlib import Path

ROWS = {"TLB:": "tlb_shootdowns", "CAL:": "function_calls"}


def read(text: str | None = None) -> dict[str, int]:
    """How many there were since the start, on all processors."""
    found = dict.fromkeys(ROWS.values(), 0)
    for line in (text or Path("/proc/interrupts").read_text(encoding="ascii")).splitlines():
        name, *words = line.split()
        if name in ROWS:
            found[ROWS[name]] = sum(int(word) for word in words if word.isdigit())
    return found


def since(before: dict[str, int]) -> dict[str, int]:
    """How many there were since a reading."""
    return {name: count - before[name] for name, count in read().items()}
