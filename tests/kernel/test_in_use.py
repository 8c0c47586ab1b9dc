# SPDX-License-Identifier: MIT
"""Pages that the kernel uses besides their mappings are left alone, until it lets go of them.

    alice[0..3]   lent to a pipe, pinned as a fixed buffer, in a send queue, the target of a read
    alice[4..7]   the same mapping, not lent
    bob[0..7]     equal to alice's

A page merged while a disk reads into it would lose the data: they would go to the old frame.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kernel import frames
from tests.kernel.actor import PAGE_BYTES, Region, Stage, content
from tests.kernel.contract import Result, State
from tests.kernel.nbd import SlowDisk
from tests.kernel.sharing import pairs, wait_until, write_privately
from tests.kernel.wire import Client

PAGES, LENT, SEED = 8, 4, 40
Step = Callable[[Region], None]


def lend_to_pipe(alice: Region) -> None:
    assert alice.actor.ask("vmsplice", alice.address, LENT) == str(LENT * PAGE_BYTES)


def drain_pipe(alice: Region) -> None:
    assert alice.actor.ask("drain", LENT, SEED) == "1"


def register_buffer(alice: Region) -> None:
    alice.actor.ask("register", alice.address, LENT)


def unregister_buffer(alice: Region) -> None:
    alice.actor.ask("unregister")


def send(alice: Region) -> None:
    assert alice.actor.ask("zerocopy", alice.address, LENT) == str(LENT * PAGE_BYTES)


def receive(alice: Region) -> None:
    alice.actor.ask("receive", LENT)


WAYS = {
    "vmsplice": (lend_to_pipe, drain_pipe),
    "io_uring": (register_buffer, unregister_buffer),
    "MSG_ZEROCOPY": (send, receive),
}


def assert_only_unlent_pages_merge(client: Client, alice: Region, bob: Region) -> None:
    before = alice.frames[:LENT].tolist()
    results = client.merge(*pairs(alice, bob))
    # With its partner out of reach, a page may join the copy that was made of it: both are right.
    for mine, yours in results[:LENT]:
        assert mine is Result.PINNED
        assert yours in (Result.SUCCESS, Result.ALREADYSH)
    assert results[LENT:] == [[Result.SUCCESS] * 2] * (PAGES - LENT)
    assert alice.frames[:LENT].tolist() == before
    for group in pairs(alice, bob)[LENT:]:
        frames.assert_shared(group)
    alice.verify()
    bob.verify()


def assert_all_merge(client: Client, alice: Region, bob: Region) -> None:
    def merged() -> bool:
        client.merge(*pairs(alice, bob))
        return bool((alice.frames == bob.frames).all())

    # The kernel may drop its references a little later, from a work queue.
    wait_until(merged, "the pages that were lent merge")
    for group in pairs(alice, bob):
        frames.assert_shared(group)
    alice.verify()
    bob.verify()
    write_privately(alice, 0, bob)


@pytest.mark.parametrize("way", WAYS)
def test_lent_pages(stage: Stage, client: Client, way: str) -> None:
    begin, end = WAYS[way]
    alice, bob = (stage.start().region(PAGES, SEED) for _ in range(2))
    begin(alice)
    assert_only_unlent_pages_merge(client, alice, bob)
    assert_only_unlent_pages_merge_again(client, alice, bob)
    end(alice)
    assert_all_merge(client, alice, bob)


def assert_only_unlent_pages_merge_again(client: Client, alice: Region, bob: Region) -> None:
    """A second try changes nothing: still in use, the others still shared."""
    before = alice.frames.tolist()
    for mine, _ in client.merge(*pairs(alice, bob))[:LENT]:
        assert mine is Result.PINNED
    assert alice.frames.tolist() == before


def test_checksum_tells_of_pins(stage: Stage, client: Client) -> None:
    alice = stage.start().region(PAGES, SEED)
    register_buffer(alice)
    states = client.records(alice)["state"].tolist()
    assert states == [State.PINNED] * LENT + [State.ANON] * (PAGES - LENT)
    unregister_buffer(alice)
    wait_until(
        lambda: set(client.records(alice)["state"].tolist()) == {State.ANON}, "no page is pinned"
    )


def test_direct_read_in_flight(stage: Stage, client: Client) -> None:
    """The data arrive after the attempt to merge, and must arrive in alice's page."""
    alice, bob = (stage.start().region(PAGES, SEED) for _ in range(2))
    with SlowDisk(content(SEED + 1, 0)) as disk:
        disk.hold()
        alice.actor.ask("direct", disk.path, alice.address, LENT)
        assert disk.asked.wait(120), "the disk was never asked"
        assert_only_unlent_pages_merge(client, alice, bob)
        disk.release()
        assert alice.actor.ask("wait") == str(LENT * PAGE_BYTES)
    assert alice.actor.ask("verify", alice.address, LENT, SEED + 1, 1) == "same"
    bob.verify()
    for mine, yours in client.merge(*pairs(alice, bob))[:LENT]:
        assert Result.NOTEQUAL in (mine, yours)
    assert alice.actor.ask("verify", alice.address, LENT, SEED + 1, 1) == "same"
    bob.verify()


def test_pages_lent_to_a_pipe_by_a_parent(stage: Stage, client: Client) -> None:
    """After a fork both map the page that the pipe holds; neither may give it up."""
    parent = stage.start().region(PAGES, SEED)
    lend_to_pipe(parent)
    child = parent.of(parent.actor.fork())
    other = stage.start().region(PAGES, SEED)
    for results in client.merge(*pairs(parent, child, other))[:LENT]:
        assert results[:2] == [Result.PINNED, Result.PINNED]
    for region in (parent, child, other):
        region.verify()
    drain_pipe(parent)
