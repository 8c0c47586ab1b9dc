# SPDX-License-Identifier: MIT
"""Memory that the module left behind, after it has been unloaded.

kmemleak finds objects that nothing points to. page_owner knows who allocated each page in use: a
page with an unloaded module in its stack is a page whose reference was never dropped. (Slab pages
belong to the allocator that cut them up, whoever happened to need the next one.)
"""

from __future__ import annotations

import bisect
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

DEBUGFS = Path("/sys/kernel/debug")
# kmemleak tells of no object younger than this, and forgets nothing that one scan alone saw.
KMEMLEAK_AGE_SECONDS = 6
# What may lie between the allocation and the module, if the page is the module's own. With anything
# else in between the page belongs to that: a page table, a trampoline, a process's memory.
ALLOCATORS = re.compile(
    r" (post_alloc_hook|prep_new_page|get_page_from_freelist|get_zeroed_page|__get_free_pages"
    r"|\w*(alloc_pages|folio_alloc|vmalloc|vzalloc|kmalloc|kvmalloc)\w*)\+"
)
ADDRESS = re.compile(r"0xffffffff[0-9a-f]{8}\b")
MODULE = "[mergemem]"


class Symbols:
    """Names for the addresses of the module, taken while it was loaded."""

    def __init__(self, kallsyms: str) -> None:
        words = (line.split() for line in kallsyms.splitlines() if MODULE in line)
        self._table = sorted((int(word[0], 16), word[2]) for word in words)

    @classmethod
    def read(cls) -> Symbols:
        return cls(Path("/proc/kallsyms").read_text(encoding="utf-8"))

    def name(self, text: str) -> str:
        """A stack with its addresses named, where they are of this load of the module."""
        return ADDRESS.sub(self._name, text)

    def _name(self, match: re.Match[str]) -> str:
        address = int(match[0], 16)
        place = bisect.bisect_right(self._table, (address, "~")) - 1
        if place < 0 or address > self._table[-1][0] + 0x1000:
            return f"{match[0]} (unloaded)"
        start, symbol = self._table[place]
        return f"{symbol}+{address - start:#x} {MODULE}"


def unreferenced_objects(symbols: Symbols) -> list[str]:
    """What kmemleak found in two scans, each with its stack."""
    control = DEBUGFS / "kmemleak"
    for _ in range(2):
        time.sleep(KMEMLEAK_AGE_SECONDS)
        control.write_text("scan")
    text = control.read_text(encoding="utf-8", errors="replace")
    records = re.split(r"^(?=unreferenced object)", text, flags=re.MULTILINE)
    return [symbols.name(record.strip()) for record in records if record.strip()]


def owned_pages(symbols: Symbols) -> list[str]:
    """Pages in use that were allocated by the unloaded module, each with its stack."""
    Path("/proc/sys/vm/drop_caches").write_text("3")
    return [symbols.name(record) for record in _page_owner() if is_leaked(record)]


def is_leaked(record: str) -> bool:
    """Whether a record of page_owner is of a page that an unloaded module held for itself."""
    _, _, flags_and_stack = record.partition("Flags")
    flags, *stack = flags_and_stack.splitlines() or [""]
    if "slab" in flags:
        return False
    for frame in stack:
        if ADDRESS.search(frame):
            return True
        if not ALLOCATORS.match(frame):
            return False
    return False


def _page_owner() -> Iterator[str]:
    """All records: each read returns one."""
    descriptor = os.open(DEBUGFS / "page_owner", os.O_RDONLY)
    try:
        while record := os.read(descriptor, 4096):
            # Only a module that has gone leaves bare addresses: the rest is symbols.
            if b" 0xffffffff" in record:
                yield record.decode(errors="replace").strip()
    finally:
        os.close(descriptor)
