# SPDX-License-Identifier: MIT
"""Huge pages and large folios are split, where a request says so, when that is worth it.

A huge page has 512 pages. With SPLIT_PERCENT it is split if at least that share of them are
candidates with the bytes of their groups; otherwise nothing of it changes.
"""

from __future__ import annotations

import errno
import struct
from collections import Counter

import numpy as np
import pytest

from tests.kernel import frames
from tests.kernel.actor import MADV_DONTNEED, PROT_NONE, PROT_READ, PROT_WRITE, Page, Region, Stage
from tests.kernel.contract import FEATURE_SPLIT, Attribute, Command, Result, State
from tests.kernel.huge import HUGE_PAGES, THP, huge_pages, of_large_folios, setting
from tests.kernel.sharing import flat, pairs, write_privately
from tests.kernel.wire import Client, Refused, attribute, merge_payload

SEED = 130
SUCCESS, HUGE = Result.SUCCESS, Result.HUGE
# A quarter of a huge page.
QUARTER = HUGE_PAGES // 4


def huge_region(stage: Stage, seed: int = SEED, count: int = 1) -> Region:
    region = stage.start().region(count * HUGE_PAGES, seed, kind="huge")
    assert huge_pages(region) == count, "no memory for huge pages"
    return region


def small_region(stage: Stage, seed: int = SEED, pages: int = HUGE_PAGES) -> Region:
    return stage.start().region(pages, seed)


def splits(client: Client) -> tuple[int, int]:
    counters = client.info().counters
    return counters["split_folios"], counters["split_failures"]


def test_two_huge_pages(stage: Stage, client: Client) -> None:
    assert client.info().features & FEATURE_SPLIT
    alice, bob = huge_region(stage), huge_region(stage)
    before = splits(client)
    results = flat(client.merge(*pairs(alice, bob), split_percent=25))
    assert Counter(results) == {SUCCESS: 2 * HUGE_PAGES}
    assert huge_pages(alice) == huge_pages(bob) == 0
    for group in pairs(alice, bob)[:: HUGE_PAGES // 8]:
        frames.assert_shared(group)
    assert (alice.frames == bob.frames).all()
    alice.verify()
    bob.verify()
    assert splits(client) == (before[0] + 2, before[1])
    info = client.info()
    assert (info.shared_pages, info.shared_mappings) == (HUGE_PAGES, 2 * HUGE_PAGES)
    write_privately(alice, 7, bob)


def test_only_on_request(stage: Stage, client: Client) -> None:
    alice, bob = huge_region(stage), small_region(stage)
    before = splits(client)
    frames_before = alice.frames
    for mine, yours in client.merge(*pairs(alice, bob)):
        assert mine is HUGE
        assert yours in (Result.ALONE, SUCCESS)
    assert huge_pages(alice) == 1
    assert (alice.frames == frames_before).all()
    assert splits(client) == before
    alice.verify()


@pytest.mark.parametrize("percent", [25, 50, 100])
def test_the_share_decides(stage: Stage, client: Client, percent: int) -> None:
    """One candidate less than the share, and it is not split; with it, it is."""
    alice, bob = huge_region(stage), small_region(stage)
    enough = HUGE_PAGES * percent // 100
    before = splits(client)
    frames_before = alice.frames
    results = client.merge(*pairs(alice, bob)[: enough - 1], split_percent=percent)
    assert {mine for mine, _ in results} == {HUGE}
    assert huge_pages(alice) == 1
    assert (alice.frames == frames_before).all()
    assert splits(client) == before
    # It stays writable as a whole.
    faults = alice.actor.minor_faults()
    alice.actor.ask("flip", alice.address, HUGE_PAGES, 1)
    alice.actor.ask("flip", alice.address, HUGE_PAGES, 1)
    assert alice.actor.minor_faults() == faults

    results = client.merge(*pairs(alice, bob)[:enough], split_percent=percent)
    assert {mine for mine, _ in results} == {SUCCESS}
    assert huge_pages(alice) == 0
    assert int((alice.frames == bob.frames).sum()) == enough
    assert splits(client) == (before[0] + 1, before[1])
    alice.verify()
    bob.verify()


def test_a_share_that_is_no_whole_page(stage: Stage, client: Client) -> None:
    """1 % of 512 pages is more than 5 pages: 6 are needed."""
    alice, bob = huge_region(stage), small_region(stage)
    results = client.merge(*pairs(alice, bob)[:5], split_percent=1)
    assert {mine for mine, _ in results} == {HUGE}
    assert huge_pages(alice) == 1
    results = client.merge(*pairs(alice, bob)[:6], split_percent=1)
    assert {mine for mine, _ in results} == {SUCCESS}
    assert huge_pages(alice) == 0


def test_the_share_is_of_pages_that_are_equal(stage: Stage, client: Client) -> None:
    """Candidates that differ from their groups count for nothing."""
    alice, bob = huge_region(stage), small_region(stage)
    alice.actor.ask("flip", alice.address, 2, 1)
    before = splits(client)
    results = client.merge(*pairs(alice, bob)[: QUARTER + 1], split_percent=25)
    mine = [result for result, _ in results]
    assert SUCCESS not in mine, "126 + 1 equal candidates are less than 128"
    assert huge_pages(alice) == 1
    assert splits(client) == before
    results = client.merge(*pairs(alice, bob)[: QUARTER + 2], split_percent=25)
    mine = [result for result, _ in results]
    assert set(mine[2:]) == {SUCCESS}
    assert SUCCESS not in mine[:2]
    assert huge_pages(alice) == 0
    alice.actor.ask("flip", alice.address, 2, 1)
    alice.verify()
    bob.verify()


def test_nothing_is_split_for_nothing(stage: Stage, client: Client) -> None:
    """Checksums may be old: when it comes to it, no two pages are equal."""
    alice, bob = huge_region(stage), huge_region(stage, SEED + 1)
    before = splits(client)
    results = flat(client.merge(*pairs(alice, bob), split_percent=1))
    assert SUCCESS not in results
    assert huge_pages(alice) == huge_pages(bob) == 1
    assert splits(client) == before
    alice.verify()
    bob.verify()


def test_candidates_that_fall_out_do_not_hide_the_rest(stage: Stage, client: Client) -> None:
    """Every other one has nobody to merge with; those between them are a quarter all the same."""
    alice, bob = huge_region(stage), small_region(stage)
    groups = [[alice[n], bob[n]] if n % 2 else [alice[n]] for n in range(2 * QUARTER)]
    results = client.merge(*groups, split_percent=25)
    assert {result for group in results[1::2] for result in group} == {SUCCESS}
    assert {result for group in results[::2] for result in group} == {Result.ALONE}
    assert huge_pages(alice) == 0
    alice.verify()
    bob.verify()


def test_naming_a_page_twice_does_not_count_twice(stage: Stage, client: Client) -> None:
    alice, bob = huge_region(stage), small_region(stage)
    groups: list[list[Page]] = [[alice[n], alice[n], bob[n]] for n in range(QUARTER - 1)]
    results = client.merge(*groups, split_percent=25)
    assert {result for first, second, _ in results for result in (first, second)} == {HUGE}
    assert huge_pages(alice) == 1


def test_neighbours_of_other_groups_count(stage: Stage, client: Client) -> None:
    """The share is of the whole request: pages of many groups, and of zeros, add up."""
    alice, bob = huge_region(stage), small_region(stage)
    alice.actor.ask("clear", alice[64].address, 64)
    keys = [alice.actor.key, bob.actor.key]
    candidates = []
    for n in range(64):
        candidates += [(alice[n].address, 0, n), (bob[n].address, 1, n)]
    candidates += [(alice[n].address, 0, 0xFFFFFFFF) for n in range(64, 128)]
    results = client.merge_candidates(keys, candidates, split_percent=25)
    assert Counter(results) == {SUCCESS: 128, Result.ZEROED: 64}
    assert huge_pages(alice) == 0
    assert int((alice.frames == bob.frames).sum()) == 64
    assert alice.actor.ask("zeros", alice[64].address, 64) == "1"
    assert alice.actor.ask("verify", alice.address, 64, SEED) == "same"


def test_within_one_huge_page(stage: Stage, client: Client) -> None:
    """Equal pages of one and the same huge page."""
    actor = stage.start()
    region = actor.region(HUGE_PAGES, SEED, period=4, kind="huge")
    assert huge_pages(region) == 1
    groups = [[region[n] for n in range(start, HUGE_PAGES, 4)] for start in range(4)]
    results = flat(client.merge(*groups, split_percent=25))
    assert Counter(results) == {SUCCESS: HUGE_PAGES}
    assert len(np.unique(region.frames)) == 4
    region.verify()


def test_full_of_zeros(stage: Stage, client: Client) -> None:
    actor = stage.start()
    region = Region(actor, actor.map(HUGE_PAGES, "huge"), HUGE_PAGES, SEED)
    actor.ask("clear", region.address, HUGE_PAGES)
    assert huge_pages(region) == 1
    records = client.records(region)
    assert set(records["state"].tolist()) == {State.ZERO}
    assert set(records["order"].tolist()) == {9}
    assert set(client.merge_zeros(*region)) == {HUGE}
    assert huge_pages(region) == 1
    anonymous = actor.status("RssAnon")
    assert set(client.merge_zeros(*region, split_percent=25)) == {Result.ZEROED}
    assert huge_pages(region) == 0
    assert frames.has_flag(region[0].frame, frames.KPF_ZERO_PAGE)
    assert len(np.unique(region.frames)) == 1
    assert abs(anonymous - actor.status("RssAnon") - HUGE_PAGES) <= 128
    assert actor.ask("zeros", region.address, HUGE_PAGES) == "1"
    region.write(0, 1)
    assert region.read(1) == 0


def test_shared_by_fork(stage: Stage, client: Client) -> None:
    """Mapped as a whole by parent and child: both mappings are split, and merge with others."""
    parent = huge_region(stage)
    child = parent.of(parent.actor.fork())
    assert huge_pages(parent) == huge_pages(child) == 1
    assert (parent.frames == child.frames).all()
    other = small_region(stage)
    results = client.merge(*pairs(parent, child, other), split_percent=25)
    assert set(flat(results)) == {SUCCESS}
    assert huge_pages(parent) == huge_pages(child) == 0
    for group in pairs(parent, child, other)[::64]:
        frames.assert_shared(group)
    for region in (parent, child, other):
        region.verify()
    write_privately(child, 3, parent, other)


def test_only_the_parent_is_named(stage: Stage, client: Client) -> None:
    parent = huge_region(stage)
    child = parent.of(parent.actor.fork())
    other = small_region(stage)
    client.merge(*pairs(parent, other), split_percent=25)
    for region in (parent, child, other):
        region.verify()
    parent.actor.ask("flip", parent.address, HUGE_PAGES, 1)
    child.verify()
    other.verify()


@pytest.mark.parametrize("way", ["vmsplice", "register"])
def test_in_use(stage: Stage, client: Client, way: str) -> None:
    """One page lent to a pipe, or pinned, and none of them may be moved by a split."""
    alice, bob = huge_region(stage), small_region(stage)
    alice.actor.ask(way, alice[200].address, 1)
    before = alice.frames
    splits_before = splits(client)
    results = client.merge(*pairs(alice, bob), split_percent=25)
    assert {mine for mine, _ in results} <= {HUGE, Result.PINNED}
    assert (alice.frames == before).all()
    assert splits(client)[0] == splits_before[0]
    alice.verify()
    bob.verify()
    if way == "register":
        alice.actor.ask("unregister")
        results = client.merge(*pairs(alice, bob), split_percent=25)
        assert {mine for mine, _ in results} == {SUCCESS}
        assert (alice.frames == bob.frames).all()
        alice.verify()


@pytest.mark.parametrize("partly", ["mprotect", "munmap", "MADV_DONTNEED"])
def test_mapped_by_single_entries(stage: Stage, client: Client, partly: str) -> None:
    """A change to a part has split the mapping, not the huge page behind it."""
    alice, bob = huge_region(stage), small_region(stage)
    words = {
        "mprotect": ("mprotect", alice.address, 8, PROT_NONE),
        "munmap": ("munmap", alice.address, 8),
        "MADV_DONTNEED": ("madvise", alice.address, 8, MADV_DONTNEED),
    }
    alice.actor.ask(*words[partly])
    assert huge_pages(alice) == 0
    assert frames.has_flag(alice[100].frame, frames.KPF_THP)
    rest = Region(alice.actor, alice[8].address, HUGE_PAGES - 8, SEED)
    records = client.records(rest)
    assert set(records["state"].tolist()) == {State.HUGE}
    assert set(records["order"].tolist()) == {9}
    groups = [[alice[n], bob[n]] for n in range(8, HUGE_PAGES)]
    assert {mine for mine, _ in client.merge(*groups)} == {HUGE}
    before = splits(client)[0]
    assert set(flat(client.merge(*groups, split_percent=25))) <= {SUCCESS, Result.ALREADYSH}
    assert splits(client)[0] == before + 1
    assert (alice.frames[8:] == bob.frames[8:]).all()
    if partly == "mprotect":
        alice.actor.ask("mprotect", alice.address, 8, PROT_READ | PROT_WRITE)
        alice.verify()
    for index in (8, HUGE_PAGES - 1):
        assert alice.read(index) == alice.original(index)
    bob.verify()


def test_part_of_a_region(stage: Stage, client: Client) -> None:
    """Three huge pages, candidates in the first two: each is judged for itself."""
    alice, bob = huge_region(stage, count=3), small_region(stage, pages=3 * HUGE_PAGES)
    groups = pairs(alice, bob)
    chosen = [*groups[:QUARTER], *groups[HUGE_PAGES : HUGE_PAGES + QUARTER - 1]]
    results = [mine for mine, _ in client.merge(*chosen, split_percent=25)]
    assert set(results[:QUARTER]) == {SUCCESS}
    assert set(results[QUARTER:]) == {HUGE}
    assert huge_pages(alice) == 2
    alice.verify()
    bob.verify()


def test_checksums_say_what_a_split_would_gain(stage: Stage, client: Client) -> None:
    alice, bob = huge_region(stage), small_region(stage)
    mine, yours = client.records(alice), client.records(bob)
    assert (mine["checksum"] == yours["checksum"]).all()
    assert set(mine["state"].tolist()) == {State.HUGE}
    assert set(mine["order"].tolist()) == {9}
    assert set(mine["map_count"].tolist()) == {1}
    assert set(yours["state"].tolist()) == {State.ANON}
    assert set(yours["order"].tolist()) == {0}


@pytest.mark.parametrize("percent", [0, 101, 0xFFFFFFFF])
def test_percent_out_of_range(stage: Stage, client: Client, percent: int) -> None:
    alice, bob = small_region(stage, pages=1), small_region(stage, pages=1)
    payload = merge_payload(pairs(alice, bob))
    payload += attribute(Attribute.SPLIT_PERCENT, struct.pack("=I", percent))
    with pytest.raises(Refused) as refused:
        client.request(Command.MERGE, payload)
    assert refused.value.errno in (errno.EINVAL, errno.ERANGE)
    assert refused.value.text
    frames.assert_distinct([alice[0], bob[0]])


def test_debians_default(stage: Stage, client: Client) -> None:
    """THP "always": nobody asked for huge pages, and nothing of the setting is touched."""
    with setting("", "always"):
        regions = []
        for _ in range(3):
            actor = stage.start()
            address = actor.map(2 * HUGE_PAGES, "default")
            regions.append(Region(actor, address, 2 * HUGE_PAGES, SEED))
            actor.ask("fill", address, 2 * HUGE_PAGES, SEED)
        assert [huge_pages(region) for region in regions] == [2, 2, 2]
        before = splits(client)[0]
        results = flat(client.merge(*pairs(*regions), split_percent=25))
        assert Counter(results) == {SUCCESS: 6 * HUGE_PAGES}
        assert splits(client)[0] == before + 6
        assert (THP / "enabled").read_text().startswith("[always]")
    for region in regions:
        region.verify()
    info = client.info()
    assert (info.shared_pages, info.shared_mappings) == (2 * HUGE_PAGES, 6 * HUGE_PAGES)


@pytest.fixture
def small_folios(request: pytest.FixtureRequest) -> int:
    """A size of folio between a page and a huge page, for memory that asks for it; in KiB."""
    kib = int(request.param)
    if not (THP / f"hugepages-{kib}kB").exists():
        pytest.skip("kernel has no huge pages of other sizes")
    return kib


@pytest.mark.parametrize("small_folios", [16, 64], indirect=True)
def test_folios_of_other_sizes(stage: Stage, client: Client, small_folios: int) -> None:
    """mTHP, on both sides."""
    pages, order = 512, (small_folios // 4).bit_length() - 1
    with setting("", "never"), setting(f"hugepages-{small_folios}kB", "madvise"):
        alice, bob = (stage.start().region(pages, SEED, kind="huge") for _ in range(2))
    assert huge_pages(alice) == 0
    assert of_large_folios(alice) == of_large_folios(bob) == pages
    records = client.records(alice)
    assert set(records["state"].tolist()) == {State.HUGE}
    assert set(records["order"].tolist()) == {order}
    assert set(flat(client.merge(*pairs(alice, bob)))) == {HUGE}
    assert of_large_folios(alice) == pages
    before = splits(client)[0]
    results = flat(client.merge(*pairs(alice, bob), split_percent=25))
    assert Counter(results) == {SUCCESS: 2 * pages}
    assert splits(client)[0] == before + 2 * (pages >> order)
    assert (alice.frames == bob.frames).all()
    alice.verify()
    bob.verify()
    write_privately(bob, 17, alice)


@pytest.mark.parametrize("small_folios", [64], indirect=True)
def test_share_of_a_folio_of_another_size(stage: Stage, client: Client, small_folios: int) -> None:
    """16 pages each; a quarter of them is four."""
    with setting("", "never"), setting(f"hugepages-{small_folios}kB", "madvise"):
        alice = stage.start().region(64, SEED, kind="huge")
    assert of_large_folios(alice) == 64
    bob = small_region(stage, pages=64)
    wanted = [*range(4), *range(16, 19), *range(32, 48)]
    results = client.merge(*[[alice[n], bob[n]] for n in wanted], split_percent=25)
    merged = [n for n, (mine, _) in zip(wanted, results, strict=True) if mine is SUCCESS]
    assert merged == [*range(4), *range(32, 48)]
    assert of_large_folios(alice) == 32
    alice.verify()
    bob.verify()
