# SPDX-License-Identifier: MIT
"""Memory that breaks: poisoned frames (hard) and frames that are given up in time (soft).

Simulated by the kernel's own means, hwpoison-inject and madvise; the bytes stay readable, so it
shows whether anybody went on using a frame. All frames are healed again at the end.
"""

from __future__ import annotations

import contextlib
import errno
import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest

from tests.kernel import frames, race
from tests.kernel.actor import ActorError, Page, Region, Stage
from tests.kernel.contract import Result, State
from tests.kernel.sharing import Merged, flat, merge_all, pairs, write_privately
from tests.kernel.wire import Client

PAGES, SEED = Merged.PAGES, Merged.SEED
KPF_HWPOISON = 19
MADV_HWPOISON, MADV_SOFT_OFFLINE = 100, 101
INJECT = Path("/sys/kernel/debug/hwpoison")
RACE_SECONDS = 3
# Longer than a page takes to leave its frame, on any host.
LONGEST_REST_SECONDS = 5.0


class Breakage:
    """Frames that were broken, to be healed when nobody uses them any more."""

    def __init__(self) -> None:
        self.frames: list[int] = []

    def inject(self, frame: int) -> None:
        """What a machine check does: mark the frame, and unmap it where that is possible."""
        self.frames.append(frame)
        # That it cannot be unmapped is an error, and no news.
        with contextlib.suppress(OSError), (INJECT / "corrupt-pfn").open("wb", 0) as file:
            file.write(str(frame).encode())
        assert frames.has_flag(frame, KPF_HWPOISON)

    def soft_offline(self, page: Page, region: Region) -> None:
        """Move the page elsewhere, and never use its frame again."""
        self.frames.append(page.frame)
        region.actor.ask("madvise", page.address, 1, MADV_SOFT_OFFLINE)

    def heal(self) -> None:
        """Give them back, as far as the kernel lets us; no mark stays."""
        for frame in self.frames:
            if frames.has_flag(frame, KPF_HWPOISON):
                (INJECT / "unpoison-pfn").write_text(str(frame))
                assert not frames.has_flag(frame, KPF_HWPOISON)


@pytest.fixture
def breakage() -> Iterator[Breakage]:
    """Asked for before the actors, so that they have gone when frames are healed."""
    subprocess.run(["modprobe", "hwpoison-inject"], check=True)
    breakage = Breakage()
    yield breakage
    breakage.heal()


def test_merged_frame_breaks(
    breakage: Breakage, merged: Merged, client: Client, stage: Stage, totals: list[int]
) -> None:
    """It cannot be unmapped, but nobody new comes to use it, and whoever writes leaves it."""
    alice, bob, bad = merged.alice, merged.bob, merged.frames[0]
    breakage.inject(bad)
    assert [alice[0].frame, bob[0].frame] == [bad, bad]
    carol = stage.start().region(PAGES, SEED)
    first, *rest = client.merge(*pairs(alice, carol, bob))
    assert first == [Result.REFUSED, Result.ALONE, Result.REFUSED]
    assert rest == [[Result.ALREADYSH, Result.SUCCESS, Result.ALREADYSH]] * (PAGES - 1)
    assert frames.map_count(bad) == 2
    assert client.records(alice)["state"].tolist() == [State.REFUSED] + [State.MERGED] * 7
    write_privately(alice, 0, bob)
    assert frames.map_count(bad) == 1
    # Two good ones merge among themselves, in a good frame.
    assert client.merge([carol[0], bob[0], alice[0]]) == [
        [Result.SUCCESS, Result.REFUSED, Result.SUCCESS]
    ]
    assert frames.assert_shared([carol[0], alice[0]]) != bad
    for region in (alice, bob, carol):
        region.verify()
    totals += [9, 24]


def test_broken_frame_is_unmerged(
    breakage: Breakage, merged: Merged, client: Client, totals: list[int]
) -> None:
    """UNMERGE copies what can be read; the frame then has no user, and none gets it again."""
    bad = merged.frames[0]
    breakage.inject(bad)
    for region in (merged.alice, merged.bob):
        assert client.unmerge(region.actor.key, region.address, PAGES)[0] == PAGES
        region.verify()
        assert region[0].frame != bad
    assert frames.map_count(bad) == 0
    assert frames.has_flag(bad, KPF_HWPOISON)
    merged.alice.actor.region(2000, SEED).verify()
    assert frames.map_count(bad) == 0
    totals += [0, 0]


def test_process_says_that_a_merged_page_is_broken(
    breakage: Breakage, merged: Merged, client: Client, totals: list[int]
) -> None:
    """MADV_HWPOISON: refused, as for any page of a driver; the mark is set all the same."""
    alice, bob, bad = merged.alice, merged.bob, merged.frames[2]
    breakage.frames.append(bad)
    with pytest.raises(ActorError, match=f"error {errno.EBUSY}"):
        alice.actor.ask("madvise", alice[2].address, 1, MADV_HWPOISON)
    assert frames.has_flag(bad, KPF_HWPOISON)
    assert client.merge([alice[2], bob[2]]) == [[Result.REFUSED, Result.REFUSED]]
    bob.actor.exit()
    alice.verify()
    alice.actor.exit()
    assert frames.map_count(bad) == 0
    totals += [0, 0]


def test_candidate_breaks(breakage: Breakage, stage: Stage, client: Client) -> None:
    """An ordinary page is unmapped; its owner is killed by the next access, and nobody else."""
    alice, bob, carol = (stage.start().region(PAGES, SEED) for _ in range(3))
    bad = alice[0].frame
    breakage.inject(bad)
    assert alice[0].frame == 0
    first, *rest = client.merge(*pairs(alice, bob, carol))
    assert first == [Result.NOPAGE1, Result.SUCCESS, Result.SUCCESS]
    assert rest == [[Result.SUCCESS] * 3] * (PAGES - 1)
    assert frames.map_count(bad) == 0
    assert bob[0].frame != bad
    with pytest.raises(ActorError):
        alice.read(0)
    alice.actor.wait()
    for region in (bob, carol):
        region.verify()
    write_privately(bob, 0, carol)


def test_merged_page_is_not_moved_off(
    breakage: Breakage, merged: Merged, client: Client, stage: Stage
) -> None:
    """MADV_SOFT_OFFLINE of a merged page: EIO, and nothing has happened."""
    with pytest.raises(ActorError, match=f"error {errno.EIO}"):
        breakage.soft_offline(merged.alice[0], merged.alice)
    assert not frames.has_flag(merged.frames[0], KPF_HWPOISON)
    merged.assert_shared()
    carol = stage.start().region(PAGES, SEED)
    assert set(flat(client.merge(*pairs(merged.alice, carol)))) == {
        Result.ALREADYSH,
        Result.SUCCESS,
    }
    write_privately(merged.alice, 0, merged.bob, carol)


def test_candidate_is_moved_off(breakage: Breakage, stage: Stage, client: Client) -> None:
    """MADV_SOFT_OFFLINE before a merge: the page moves, and merges where it is now."""
    alice, bob = (stage.start().region(PAGES, SEED) for _ in range(2))
    old = alice.frames.tolist()
    for page in alice:
        breakage.soft_offline(page, alice)
    assert all(frames.has_flag(frame, KPF_HWPOISON) for frame in old)
    merge_all(client, alice, bob)
    assert not set(alice.frames.tolist()) & set(old)
    write_privately(alice, 0, bob)


def test_moved_off_while_merging(breakage: Breakage, stage: Stage, client: Client) -> None:
    """Pages leave their frames at the moment in which they are merged: before it, or not at all."""
    pages = 32
    alice, bob = (stage.start().region(pages, SEED) for _ in range(2))
    bytes_of_alice = [alice.original(page) for page in range(pages)]
    stop = Event()
    chance = random.Random(1)
    results: list[Result] = []
    rest_seconds = 0.001

    def merge() -> None:
        while not stop.is_set():
            results.extend(flat(client.merge(*pairs(alice, bob))))
            stop.wait(chance.uniform(0, rest_seconds))

    def move_off(page: int) -> bool:
        # A frame of its own, if it has none.
        alice.write(page, bytes_of_alice[page])
        try:
            breakage.soft_offline(alice[page], alice)
        except ActorError:
            return False
        return True

    outcomes: Counter[bool] = Counter()

    def met() -> bool:
        return min(outcomes[True], outcomes[False]) >= pages and Result.SUCCESS in results

    def told() -> object:
        return outcomes, Counter(results), rest_seconds

    merging = Thread(target=merge)
    merging.start()
    try:
        for _ in race.rounds(RACE_SECONDS, met, told):
            moved = sum(move_off(page) for page in range(pages))
            outcomes.update({True: moved, False: pages - moved})
            # Whoever always wins is given a handicap.
            if 2 * moved < pages:
                rest_seconds = min(2 * rest_seconds, LONGEST_REST_SECONDS)
            else:
                rest_seconds /= 2
    finally:
        stop.set()
        merging.join()
    print(f"{outcomes[True]} moved, {outcomes[False]} not, {Counter(results)}")
    for region in (alice, bob):
        region.verify()
        assert not any(frames.has_flag(page.frame, KPF_HWPOISON) for page in region)
    assert set(results) <= {
        Result.SUCCESS,
        Result.ALREADYSH,
        Result.ALONE,
        Result.BUSY,
        Result.NOPAGE1,
        Result.PINNED,
    }
