# SPDX-License-Identifier: MIT
"""CHECKSUM: what user space gets to see of pages."""

from __future__ import annotations

import errno
import struct
from collections import Counter

import numpy as np
import pytest

from tests.kernel import frames
from tests.kernel.actor import MADV_DONTNEED, PAGE_BYTES, Region, Stage
from tests.kernel.contract import DEPTH_SAMPLE_BYTES, Attribute, Command, State
from tests.kernel.module import Module
from tests.kernel.sharing import merge_all
from tests.kernel.wire import NLM_F_DUMP, Client, Refused, attribute, range_payload

PAGES, SEED = 16, 60
LOWER_HALF = np.uint64(0xFFFF_FFFF)


def states(client: Client, region: Region, depth: int = 4096) -> list[int]:
    return [int(state) for state in client.records(region, depth)["state"]]


def test_equal_pages_have_equal_checksums(stage: Stage, client: Client) -> None:
    alice = stage.start().region(PAGES, SEED)
    bob = stage.start().region(PAGES, SEED, period=5)
    ours, theirs = client.records(alice), client.records(bob)
    assert len(np.unique(ours["checksum"])) == PAGES
    assert len(np.unique(theirs["checksum"])) == 5
    assert (theirs["checksum"] == ours["checksum"][np.arange(PAGES) % 5]).all()
    assert set(ours["state"].tolist()) == {State.ANON}
    assert (ours["map_count"] == 1).all()
    assert not ours["order"].any()


@pytest.mark.parametrize("byte", [0, 1, 2047, 4095])
def test_every_byte_counts_at_full_depth(stage: Stage, client: Client, byte: int) -> None:
    region = stage.start().region(2, SEED, period=1)
    before = client.records(region)["checksum"]
    assert before[0] == before[1]
    at = region.address + byte
    region.actor.ask("write", at, int(region.actor.ask("read", at)) ^ 1)
    after = client.records(region)["checksum"]
    assert after[1] == before[1]
    assert after[0] != before[0]


@pytest.mark.parametrize("depth", [64, 256, 1024])
def test_samples_are_a_part_of_the_page(stage: Stage, client: Client, depth: int) -> None:
    """Of 64 pages that differ in one cache line each, as many show as lines are sampled."""
    region = stage.start().region(65, SEED, period=1)
    for line in range(64):
        at = region.address + line * PAGE_BYTES + line * 64
        region.actor.ask("write", at, int(region.actor.ask("read", at)) ^ 1)
    records = client.records(region, depth)
    sampled = records["checksum"][:64] != records["checksum"][64]
    assert sampled.sum() == depth // 64
    full = client.records(region)
    assert len(np.unique(full["checksum"])) == 65
    # No depth can be told from another by its checksums.
    assert not np.isin(records["checksum"], full["checksum"]).any()


def test_states(stage: Stage, client: Client) -> None:
    alice, bob = (stage.start().region(PAGES, SEED) for _ in range(2))
    merge_all(client, alice, bob)
    actor = alice.actor
    actor.ask("write", alice[0].address, alice.original(0) ^ 1)
    actor.ask("clear", alice[1].address, 1)
    actor.ask("madvise", alice[2].address, 2, MADV_DONTNEED)
    actor.ask("touch", alice[3].address, 1)
    expected = [State.ANON, State.ZERO, State.ABSENT, State.ZERO_PAGE]
    assert states(client, alice) == expected + [State.MERGED] * (PAGES - 4)
    records = client.records(alice)
    assert records["map_count"].tolist() == [1, 1, 0, 0] + [2] * (PAGES - 4)
    assert not records["checksum"][2:4].any()
    assert records["checksum"][[0, 1]].all()
    assert (records["checksum"][4:] == client.records(bob)["checksum"][4:]).all()
    assert states(client, alice, 64) == states(client, alice)
    # Of what is not read, nobody can say that it is filled with zeros.
    assert states(client, alice, 0)[1] == State.ANON


def test_a_full_checksum_begins_with_its_sample(stage: Stage, client: Client) -> None:
    """So one that was read in full can be compared with one that was sampled."""
    region = stage.start().region(PAGES, SEED)
    full = client.records(region)["checksum"]
    sampled = client.records(region, DEPTH_SAMPLE_BYTES)["checksum"]
    assert (full >> np.uint64(32) == sampled >> np.uint64(32)).all()
    assert not (sampled & LOWER_HALF).any()
    assert len(np.unique(full & LOWER_HALF)) == PAGES
    shallower = client.records(region, 64)["checksum"]
    assert (shallower >> np.uint64(32) != sampled >> np.uint64(32)).all()


def test_some_pages_in_full(stage: Stage, client: Client) -> None:
    """Those asked for in full, others sampled; merged pages only if they are asked for."""
    alice, bob = (stage.start().region(PAGES, SEED) for _ in range(2))
    merge_all(client, alice, bob)
    for page in range(0, PAGES, 2):
        alice.write(page, page ^ 0x5A)
    full = client.records(alice)
    sampled = client.records(alice, DEPTH_SAMPLE_BYTES)
    before = client.info().counters
    chosen = [2, 3, 8, 15]
    seen = client.records(alice, DEPTH_SAMPLE_BYTES, full=chosen)
    for page in range(PAGES):
        if page in chosen:
            assert seen[page] == full[page]
        elif page % 2:
            assert (seen[page]["state"], seen[page]["map_count"]) == (State.MERGED, 2)
            assert not seen[page]["checksum"]
        else:
            assert seen[page] == sampled[page]
    after = client.info().counters
    assert after["checksummed_pages"] - before["checksummed_pages"] == len(chosen)
    assert after["sampled_pages"] - before["sampled_pages"] == PAGES // 2 - 2


def test_states_alone(stage: Stage, client: Client) -> None:
    """At depth 0 no page is read, but for those asked for in full."""
    region = stage.start().region(PAGES, SEED)
    before = client.info().counters
    records = client.records(region, 0)
    assert not records["checksum"].any()
    assert set(records["state"].tolist()) == {State.ANON}
    assert (records["map_count"] == 1).all()
    assert client.info().counters == before
    seen = client.records(region, 0, full=[5])
    assert np.flatnonzero(seen["checksum"]).tolist() == [5]


def test_pages_in_full_over_many_messages(stage: Stage, client: Client) -> None:
    """The bitmap belongs to the whole range, of which each message is a part."""
    actor = stage.start()
    region = actor.region(3000, SEED)
    wanted = [0, 7, 8, 511, 512, 513, 1023, 2047, 2048, 2999]
    seen = client.records(region, 0, full=wanted)
    assert np.flatnonzero(seen["checksum"]).tolist() == wanted
    assert (seen["checksum"][wanted] == client.records(region)["checksum"][wanted]).all()
    # As well when the range begins in the middle of a byte of nobody's bitmap.
    (run,) = client.checksum(actor.key, region[513].address, 9, 0, full=[8])
    assert np.flatnonzero(run.records["checksum"]).tolist() == [8]


@pytest.mark.parametrize(("pages", "bytes_given"), [(8, 2), (9, 1), (16, 1), (65537, 8193)])
def test_bitmap_of_another_size(stage: Stage, client: Client, pages: int, bytes_given: int) -> None:
    region = stage.start().region(PAGES, SEED)
    payload = range_payload(region.actor.key, region.address, pages)
    payload += attribute(Attribute.DEPTH, struct.pack("=I", 0))
    payload += attribute(Attribute.FULL_PAGES, bytes(bytes_given))
    with pytest.raises(Refused) as refused:
        client.request(Command.CHECKSUM, payload, NLM_F_DUMP)
    assert refused.value.errno in (errno.EINVAL, errno.ERANGE)
    assert refused.value.text


def test_map_count_of_forked_pages(stage: Stage, client: Client) -> None:
    region = stage.start().region(PAGES, SEED)
    child = region.of(region.actor.fork())
    child.actor.fork()
    assert (client.records(region)["map_count"] == 3).all()
    child.write(0, 1)
    assert client.records(region)["map_count"].tolist() == [2] + [3] * (PAGES - 1)


def test_huge_subpages(stage: Stage, client: Client) -> None:
    """Their checksums are those of the same bytes elsewhere; only the state tells."""
    huge = stage.start().region(1024, SEED, period=64, kind="huge")
    small = stage.start().region(1024, SEED, period=64)
    assert frames.has_flag(huge[0].frame, frames.KPF_THP)
    records = client.records(huge)
    assert set(records["state"].tolist()) == {State.HUGE}
    assert (records["map_count"] == 1).all()
    assert (records["checksum"] == client.records(small)["checksum"]).all()


def test_huge_zero_page(stage: Stage, client: Client) -> None:
    actor = stage.start()
    region = Region(actor, actor.map(512, "huge"), 512, SEED)
    actor.ask("touch", region.address, 512)
    assert set(states(client, region)) == {State.ZERO_PAGE}


def test_runs_skip_what_is_not_mapped(stage: Stage, client: Client) -> None:
    """From the first page of the address space to the last; runs ascend and do not overlap."""
    actor = stage.start()
    region = actor.region(1300, SEED)
    hole = Region(actor, actor.map(600), 600, SEED)
    actor.ask("mlock", region[0].address, 1)
    end = 0
    seen: Counter[object] = Counter()
    for run in client.checksum(actor.key, 0, (1 << 47) // PAGE_BYTES - 1):
        assert run.address >= end
        pages = run.refused_pages or len(run.records)
        end = run.address + pages * PAGE_BYTES
        if region.address <= run.address < region.address + 1300 * PAGE_BYTES:
            seen["refused"] += run.refused_pages
            seen.update(run.records["state"].tolist())
        assert not hole.address <= run.address < hole.address + 600 * PAGE_BYTES
    assert seen == {"refused": 1, State.ANON: 1299}


def test_part_of_a_range(stage: Stage, client: Client) -> None:
    region = stage.start().region(700, SEED)
    whole = client.records(region)["checksum"]
    (run,) = client.checksum(region.actor.key, region[513].address, 3)
    assert run.address == region[513].address
    assert (run.records["checksum"] == whole[513:516]).all()


def test_large_range_needs_many_messages(stage: Stage, client: Client) -> None:
    region = stage.start().region(10000, SEED, period=100)
    before = client.info().counters
    runs = client.checksum(region.actor.key, region.address, region.pages)
    assert sum(len(run.records) for run in runs) == 10000
    assert len(runs) >= 10000 // 512
    assert len(np.unique(np.concatenate([run.records["checksum"] for run in runs]))) == 100
    after = client.info().counters
    assert after["checksummed_pages"] == before["checksummed_pages"] + 10000
    client.records(region, 64)
    assert client.info().counters["sampled_pages"] == before["sampled_pages"] + 10000


def test_reading_changes_nothing(stage: Stage, client: Client) -> None:
    region = stage.start().region(PAGES, SEED)
    before = region.frames
    assert (client.records(region)["checksum"] == client.records(region)["checksum"]).all()
    assert (region.frames == before).all()
    region.verify()


def test_key_differs_after_a_reload(stage: Stage, module: Module) -> None:
    """What is remembered of one load tells nothing after the next, not even of zeros."""
    region = stage.start().region(PAGES, SEED)
    region.actor.ask("clear", region[0].address, 1)
    with Client() as client:
        before = client.records(region), client.records(region, 64)
    module.reload()
    with Client() as client:
        after = client.records(region), client.records(region, 64)
    for old, new in zip(before, after, strict=True):
        assert (old["state"] == new["state"]).all()
        assert not np.isin(old["checksum"], new["checksum"]).any()
