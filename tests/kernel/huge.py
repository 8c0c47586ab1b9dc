# SPDX-License-Identifier: MIT
"""Huge pages and large folios of actors: how to get them, and how to see that they are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kernel import frames
from tests.kernel.actor import Region

THP = Path("/sys/kernel/mm/transparent_hugepage")
HUGE_PAGES = 512


def huge_pages(region: Region) -> int:
    """How many huge pages are mapped as such in a region: AnonHugePages of its smaps."""
    kib = 0
    inside = False
    for line in Path(f"/proc/{region.actor.pid}/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(text, 16) for text in found.groups())
            inside = start < region.address + region.pages * 4096 and region.address < end
        elif inside and line.startswith("AnonHugePages:"):
            kib += int(line.split()[1])
    return kib // 2048


def of_large_folios(region: Region) -> int:
    """How many pages of a region are part of one, mapped as a whole or by single entries."""
    return sum(frames.has_flag(page.frame, frames.KPF_THP) for page in region)


@contextmanager
def setting(size: str, value: str) -> Iterator[None]:
    """transparent_hugepage/enabled, or that of one size, for a while."""
    file = THP / size / "enabled"
    before = re.search(r"\[(\w+)\]", file.read_text())
    assert before
    file.write_text(value)
    try:
        yield
    finally:
        file.write_text(before[1])
