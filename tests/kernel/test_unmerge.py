# SPDX-License-Identifier: MIT
"""UNMERGE: merged pages get frames of their own again, in one process."""

from __future__ import annotations

import errno
import itertools
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.kernel import frames
from tests.kernel.actor import MADV_DONTNEED, PAGE_BYTES, PROT_READ, PROT_WRITE, Region, Stage
from tests.kernel.contract import MAX_CANDIDATES, MAX_UNMERGE_PAGES, Attribute, Command, Result
from tests.kernel.sharing import DEADLINE_SECONDS, flat, merge_all, pairs, write_privately
from tests.kernel.wire import Client, Refused, attribute, unmerge_payload

PAGES, SEED = 600, 70
# So many that no frame gets more mappings than it may have.
CONTENTS = 16
# All of a process: the first page, and the last one of its address space.
USER_PAGES = (1 << 47) // PAGE_BYTES - 1


@pytest.fixture
def merged(stage: Stage, client: Client) -> tuple[Region, Region]:
    """Two processes that share everything, over two page tables."""
    alice, bob = (stage.start().region(PAGES, SEED) for _ in range(2))
    assert set(flat(client.merge(*pairs(alice, bob)))) == {Result.SUCCESS}
    assert (alice.frames == bob.frames).all()
    return alice, bob


def test_everything(client: Client, merged: tuple[Region, Region]) -> None:
    alice, bob = merged
    shared = alice.frames
    before = client.info().counters["unmerged_pages"]
    end = alice.address + PAGES * PAGE_BYTES
    assert client.unmerge(alice.actor.key, alice.address, PAGES) == (PAGES, end)
    assert not np.isin(alice.frames, shared).any()
    assert alice.frames.all()
    assert (bob.frames == shared).all()
    assert all(frames.has_flag(page.frame, frames.KPF_ANON) for page in list(alice)[::100])
    alice.verify()
    bob.verify()
    info = client.info()
    assert (info.shared_pages, info.shared_mappings) == (PAGES, PAGES)
    assert info.counters["unmerged_pages"] == before + PAGES
    # Not a byte written, and yet the next write takes no fault that would copy.
    own = alice[5].frame
    alice.write(5, 1)
    assert alice[5].frame == own
    assert client.unmerge(alice.actor.key, alice.address, PAGES) == (0, end)


def test_part(client: Client, merged: tuple[Region, Region]) -> None:
    alice, bob = merged
    unmerged, after = client.unmerge(alice.actor.key, alice[510].address, 4)
    assert (unmerged, after) == (4, alice[514].address)
    same = alice.frames == bob.frames
    assert same.sum() == PAGES - 4
    assert not same[510:514].any()
    alice.verify()
    bob.verify()


def test_merges_again(client: Client, merged: tuple[Region, Region]) -> None:
    alice, bob = merged
    client.unmerge(alice.actor.key, alice.address, PAGES)
    client.unmerge(bob.actor.key, bob.address, PAGES)
    assert client.info().shared_pages == 0
    for group in pairs(alice, bob)[:10]:
        frames.assert_distinct(group)
    assert set(flat(client.merge(*pairs(alice, bob)))) == {Result.SUCCESS}
    write_privately(alice, 0, bob)


def test_read_only_memory(client: Client, merged: tuple[Region, Region]) -> None:
    alice, bob = merged
    alice.actor.ask("mprotect", alice.address, PAGES, PROT_READ)
    assert client.unmerge(alice.actor.key, alice.address, PAGES)[0] == PAGES
    alice.verify()
    alice.actor.ask("mprotect", alice.address, PAGES, PROT_READ | PROT_WRITE)
    own = alice[0].frame
    alice.write(0, 1)
    assert alice.read(0) == 1
    assert own not in bob.frames
    bob.verify()


def test_leaves_what_is_not_merged(stage: Stage, client: Client) -> None:
    """Absent pages stay absent, ordinary ones where they are, and other mappings are skipped."""
    alice, bob = (stage.start().region(PAGES, SEED) for _ in range(2))
    client.merge(*pairs(alice, bob)[100:200])
    alice.actor.ask("munmap", alice[300].address, 100)
    alice.actor.ask("madvise", alice[400].address, 100, MADV_DONTNEED)
    before = alice.frames
    unmerged, _ = client.unmerge(alice.actor.key, 0, USER_PAGES)
    assert unmerged == 100
    changed = alice.frames != before
    assert changed[100:200].all()
    assert not changed[:100].any()
    assert not changed[200:].any()
    assert alice.actor.ask("verify", alice.address, 300, SEED) == "same"
    bob.verify()


def test_not_enough_memory(stage: Stage, client: Client) -> None:
    """Refused before anything is changed, with a text; the host lives on."""
    pages = 16000
    region = stage.start().region(pages, SEED, period=CONTENTS)
    merge_by_content(client, region)
    with little_memory_available(pages=10000):
        with pytest.raises(Refused) as refused:
            client.unmerge(region.actor.key, region.address, pages)
        assert refused.value.errno == errno.ENOMEM
        assert "memory" in refused.value.text
        assert len(np.unique(region.frames)) == CONTENTS
    assert client.unmerge(region.actor.key, region.address, pages)[0] == pages
    region.verify()


def merge_by_content(client: Client, region: Region) -> None:
    """The pages of a region of CONTENTS contents get as many frames, by several requests."""
    listed = list(region)
    share = MAX_CANDIDATES // CONTENTS - 1
    for start in range(CONTENTS, len(listed), share * CONTENTS):
        groups = [
            [listed[n], *listed[start + n : start + share * CONTENTS : CONTENTS]]
            for n in range(CONTENTS)
        ]
        results = flat(client.merge(*groups))
        assert set(results) <= {Result.SUCCESS, Result.ALREADYSH}, Counter(results)
    assert len(np.unique(region.frames)) == CONTENTS


@contextmanager
def little_memory_available(pages: int) -> Iterator[None]:
    """Raise what the kernel keeps in reserve: quicker than using all memory up, and reversible."""
    reserve = Path("/proc/sys/vm/min_free_kbytes")
    before = reserve.read_text()
    try:
        while (rest_pages := meminfo_pages("MemAvailable") - pages) > 1000:
            # 1.5 times as much, the high watermark, is not available; approach it from below.
            reserve.write_text(str(int(reserve.read_text()) + rest_pages * 4 * 6 // 10))
        yield
    finally:
        reserve.write_text(before)


def meminfo_pages(field: str) -> int:
    """A field of /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) // 4
    raise KeyError(field)


def test_merge_all_then_exit_order(stage: Stage, client: Client) -> None:
    """Unmerging one of three leaves the other two as they were, whoever exits first."""
    regions = [stage.start().region(8, SEED) for _ in range(3)]
    merge_all(client, *regions)
    client.unmerge(regions[0].actor.key, regions[0].address, 8)
    regions[0].actor.exit()
    for group in pairs(*regions[1:]):
        frames.assert_shared(group)
    regions[1].actor.exit()
    regions[2].verify()


def test_counting_changes_nothing(client: Client, merged: tuple[Region, Region]) -> None:
    alice, bob = merged
    alice.write(7, 1)
    before = alice.frames
    counter = client.info().counters["unmerged_pages"]
    faults = alice.actor.minor_faults()
    end = alice.address + PAGES * PAGE_BYTES
    for address, pages, expected in (
        (alice.address, PAGES, PAGES - 1),
        (alice[5].address, 10, 9),
        (0, USER_PAGES, PAGES - 1),
    ):
        counted, after = client.unmerge(alice.actor.key, address, pages, count_only=True)
        assert counted == expected
        assert after == (address + pages * PAGE_BYTES)
    assert (alice.frames == before).all()
    assert alice.actor.minor_faults() == faults
    assert client.info().counters["unmerged_pages"] == counter
    # And it says what the real thing then does.
    assert client.unmerge(alice.actor.key, alice.address, PAGES) == (PAGES - 1, end)
    assert client.unmerge(alice.actor.key, 0, USER_PAGES, count_only=True)[0] == 0
    bob.verify()


def test_counting_asks_for_no_memory(stage: Stage, client: Client) -> None:
    """Nor is it bounded by what one request may change."""
    pages = MAX_UNMERGE_PAGES + 1500
    region = stage.start().region(pages, SEED, period=CONTENTS)
    merge_by_content(client, region)
    end = region.address + pages * PAGE_BYTES
    with little_memory_available(pages=10000):
        counted = client.unmerge(region.actor.key, region.address, pages, count_only=True)
    assert counted == (pages, end)


def test_flag_with_content(client: Client, merged: tuple[Region, Region]) -> None:
    """COUNT_ONLY is a flag: nobody shall think that a 0 in it turns it off."""
    alice, _ = merged
    payload = unmerge_payload(alice.actor.key, alice.address, PAGES)
    with pytest.raises(Refused) as refused:
        client.request(Command.UNMERGE, payload + attribute(Attribute.COUNT_ONLY, bytes(4)))
    assert refused.value.errno in (errno.EINVAL, errno.ERANGE)
    assert client.info().shared_mappings == 2 * PAGES


def test_everything_of_everybody(stage: Stage, client: Client) -> None:
    """Process after process, from one end of memory to the other: nothing is left."""
    regions = [stage.start().region(700, SEED) for _ in range(3)]
    regions += [region.of(region.actor.fork()) for region in regions[:1]]
    zero = stage.start()
    zero_region = Region(zero, zero.map(4), 4, SEED)
    zero.ask("clear", zero_region.address, 4)
    client.merge(*pairs(*regions))
    client.merge_zeros(*zero_region)
    assert client.info().shared_mappings == 4 * 700
    for region in regions:
        address, unmerged = 0, 0
        while address < USER_PAGES * PAGE_BYTES:
            pages = USER_PAGES - address // PAGE_BYTES
            count, after = client.unmerge(region.actor.key, address, pages)
            assert address < after
            address, unmerged = after, unmerged + count
        assert unmerged == 700
    info = client.info()
    assert (info.shared_pages, info.shared_mappings) == (0, 0)
    for region in regions:
        region.verify()


def test_progress(stage: Stage, client: Client) -> None:
    """NEXT leads through a range that takes several requests, and counts add up."""
    pages = MAX_UNMERGE_PAGES + 1500
    region = stage.start().region(pages, SEED, period=CONTENTS)
    merge_by_content(client, region)
    end = region.address + pages * PAGE_BYTES
    address, steps, unmerged = region.address, 0, 0
    while address < end:
        left = (end - address) // PAGE_BYTES
        expected = client.unmerge(region.actor.key, address, left, count_only=True)[0]
        assert expected == pages - unmerged
        count, address = client.unmerge(region.actor.key, address, left)
        assert count <= MAX_UNMERGE_PAGES
        steps, unmerged = steps + 1, unmerged + count
    assert (address, unmerged, steps) == (end, pages, 2)
    assert client.info().shared_pages == 0
    assert len(np.unique(region.frames)) == pages
    region.verify()


def test_interrupted(stage: Stage, client: Client) -> None:
    """A signal ends it in the middle: it says how far it got, and the rest is as before."""
    pages = 6000
    region = stage.start().region(pages, SEED, period=CONTENTS)
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    deadline = time.monotonic() + DEADLINE_SECONDS
    try:
        unmerged = after = 0
        for attempt in itertools.count():
            assert time.monotonic() < deadline, "no request was ever met in the middle"
            merge_by_content(client, region)
            signal.setitimer(signal.ITIMER_REAL, 0.002 * (1 + attempt % 20))
            unmerged, after = unmerge_or_nothing(client, region)
            if 0 < unmerged < pages:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert region.address < after < region.address + pages * PAGE_BYTES
    assert client.info().shared_mappings == pages - unmerged
    region.verify()
    left = pages - (after - region.address) // PAGE_BYTES
    assert client.unmerge(region.actor.key, after, left)[0] == pages - unmerged
    assert client.info().shared_pages == 0
    assert len(np.unique(region.frames)) == pages
    region.verify()


def unmerge_or_nothing(client: Client, region: Region) -> tuple[int, int]:
    """A signal before the first page is an error, and nothing has changed."""
    try:
        unmerged, after = client.unmerge(region.actor.key, region.address, region.pages)
    except Refused as refused:
        if refused.errno not in (errno.EINTR, errno.ECANCELED):
            raise
        assert len(np.unique(region.frames)) == CONTENTS
        return 0, 0
    assert unmerged
    return unmerged, after
