# SPDX-License-Identifier: MIT
"""Control groups of memory: whose pages are counted where."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kernel.actor import PAGE_BYTES, Actor

ROOT = Path("/sys/fs/cgroup")
_numbers = itertools.count()


class Cgroup:
    """A control group with the memory controller."""

    def __init__(self, parent: Path = ROOT) -> None:
        (parent / "cgroup.subtree_control").write_text("+memory")
        self.path = parent / f"mergemem-{next(_numbers)}"
        self.path.mkdir()

    def child(self) -> Cgroup:
        """A group within this one."""
        return Cgroup(self.path)

    def add(self, actor: Actor) -> Actor:
        """What the process allocates from now on counts here."""
        (self.path / "cgroup.procs").write_text(str(actor.pid))
        return actor

    @property
    def pages(self) -> int:
        """What is charged, kernel memory included; up to 64 pages a processor too much."""
        return int((self.path / "memory.current").read_text()) // PAGE_BYTES

    def stat(self, field: str) -> int:
        """A field of memory.stat that is in bytes, in pages."""
        return self._fields("memory.stat")[field] // PAGE_BYTES

    def events(self, field: str) -> int:
        """A field of memory.events."""
        return self._fields("memory.events")[field]

    def limit(self, pages: int | None, swap: bool = True) -> None:
        """memory.max; None is no limit. What is above it, and may be swapped, is."""
        if not swap and (self.path / "memory.swap.max").exists():
            (self.path / "memory.swap.max").write_text("0")
        limit = "max" if pages is None else str(pages * PAGE_BYTES)
        (self.path / "memory.max").write_text(limit)

    def remove(self) -> None:
        """rmdir; no process may be in it."""
        self.path.rmdir()

    def _fields(self, name: str) -> dict[str, int]:
        lines = (self.path / name).read_text().splitlines()
        return {field: int(value) for field, value in (line.split() for line in lines)}


@contextmanager
def many() -> Iterator[list[Cgroup]]:
    """A list of groups that are removed at the end, the last first, if they are still there."""
    groups: list[Cgroup] = []
    yield groups
    for group in reversed(groups):
        if group.path.exists():
            group.remove()
