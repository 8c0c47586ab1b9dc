# SPDX-License-Identifier: MIT
"""NUMA nodes: which there are, on which pages lie, and memory that is bound to one."""

from __future__ import annotations

import re
from pathlib import Path

from tests.kernel.actor import Actor, Region
from tests.kernel.syscalls import move_pages

MPOL_BIND = 2


def with_memory() -> list[int]:
    """The nodes that have memory."""
    text = Path("/sys/devices/system/node/has_memory").read_text()
    nodes: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        nodes += range(int(first), int(last or first) + 1)
    return nodes


def of(region: Region) -> list[int]:
    """The node of each page; a negative errno where there is none."""
    return move_pages(region.actor.pid, [page.address for page in region], None, 0)


def region_on(actor: Actor, node: int, pages: int, seed: int, period: int = 0) -> Region:
    """A new mapping, filled, in memory of one node."""
    region = Region(actor, actor.map(pages), pages, seed, period)
    actor.ask("mbind", region.address, pages, MPOL_BIND, 1 << node, 0)
    actor.ask("fill", region.address, pages, seed, period)
    assert of(region) == [node] * pages
    return region
