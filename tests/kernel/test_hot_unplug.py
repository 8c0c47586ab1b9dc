# SPDX-License-Identifier: MIT
"""Taking memory away from a running system, block by block.

A shared page cannot be moved, so the block that it lies in stays, and whoever wants it away is told
so at once. That is why shared pages are never taken from movable memory, where an administrator
who means to unplug has said that everything must be movable.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel import nodes
from tests.kernel.actor import PAGE_BYTES, Region, Stage
from tests.kernel.sharing import Merged, merge_all, write_privately
from tests.kernel.wire import Client

PAGES, SEED = 256, 150
MEMORY = Path("/sys/devices/system/memory")
# Taking away moves pages, and the kernel tries for ever.
TRY_SECONDS = 60
# Enough to find one in which nothing of the kernel's lies.
TRIES = 8


def block_bytes() -> int:
    return int((MEMORY / "block_size_bytes").read_text(), 16)


def blocks(region: Region) -> set[int]:
    """The blocks in which its frames lie."""
    return {int(frame) * PAGE_BYTES // block_bytes() for frame in region.frames}


def ask(block: int, state: str) -> str:
    """Change the state of a block; empty, or why that failed."""
    words = ["timeout", "-s", "INT", str(TRY_SECONDS), "dd", f"of={path(block)}", "status=none"]
    return subprocess.run(words, input=state, stderr=subprocess.PIPE, text=True).stderr


def path(block: int) -> Path:
    return MEMORY / f"memory{block}" / "state"


def node_of(block: int) -> int:
    (link,) = path(block).parent.glob("node[0-9]*")
    return int(link.name.removeprefix("node"))


def test_block_with_a_merged_page(merged: Merged) -> None:
    for block in blocks(merged.alice):
        assert "busy" in ask(block, "offline")
        assert path(block).read_text() == "online\n"
    assert merged.alice.frames.tolist() == merged.frames
    merged.assert_shared()
    write_privately(merged.alice, 0, merged.bob)


@pytest.fixture
def movable() -> Iterator[int]:
    """A block of memory for movable pages only."""
    every = sorted((int(p.name[6:]) for p in MEMORY.glob("memory[0-9]*")), reverse=True)
    block = next((block for block in every[:TRIES] if not ask(block, "offline")), None)
    assert block is not None, "no block of memory can be taken offline"
    assert not ask(block, "online_movable")
    yield block
    if path(block).read_text() == "online\n":
        assert not ask(block, "offline")
    assert not ask(block, "online")


def test_movable_block(movable: int, stage: Stage, client: Client) -> None:
    """Pages out of it merge into a frame elsewhere, so it can still be taken away."""
    node = node_of(movable)
    alice, bob, private = (
        nodes.region_on(stage.start(), node, PAGES, SEED + n // 2) for n in range(3)
    )
    for region in (alice, bob, private):
        # User memory comes from a node's movable memory first.
        assert blocks(region) == {movable}
    merge_all(client, alice, bob)
    assert movable not in blocks(alice)
    before = alice.frames.tolist()
    assert not ask(movable, "offline")
    assert alice.frames.tolist() == before == bob.frames.tolist()
    assert movable not in blocks(private)
    for region in (alice, bob, private):
        region.verify()
    write_privately(alice, 0, bob)
    write_privately(bob, 1, alice)
