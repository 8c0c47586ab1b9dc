# SPDX-License-Identifier: MIT
"""Who may vanish at any moment: the client, the module, the processes. Nothing is left behind."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time

import numpy as np
import pytest

from tests.kernel import frames
from tests.kernel.accounting import settled_free_pages
from tests.kernel.actor import Stage
from tests.kernel.contract import Attribute, Command, Result, State
from tests.kernel.module import Module
from tests.kernel.sharing import (
    DEADLINE_SECONDS,
    flat,
    merge_all,
    pairs,
    wait_until,
    write_privately,
)
from tests.kernel.wire import Client, Refused, merge_payload

SEED = 90
# Other parts of the system allocate too; a leak of a test's pages is larger.
SLACK_PAGES = 2500


def test_module_unloaded_while_pages_are_merged(stage: Stage, module: Module) -> None:
    alice, bob, carol = (stage.start().region(40, SEED) for _ in range(3))
    with Client() as client:
        merge_all(client, alice, bob)
    shared = alice.frames
    module.unload()
    with pytest.raises(Refused), Client() as client:
        client.info()
    # The kernel needs no module to go on with them.
    assert (alice.frames == shared).all()
    assert (bob.frames == shared).all()
    child = alice.of(alice.actor.fork())
    write_privately(child, 0, alice, bob)
    write_privately(bob, 1, child, alice)
    child.actor.exit()
    bob.actor.ask("munmap", bob[2].address, 1)
    alice.verify()

    module.load()
    with Client() as client:
        info = client.info()
        assert (info.shared_pages, info.shared_mappings) == (40, 78)
        records = client.records(alice)
        assert set(records["state"].tolist()) == {State.MERGED}
        assert records["map_count"].tolist() == [2, 1, 1] + [2] * 37
        # Equal pages join those of the earlier load.
        results = client.merge(*pairs(carol, alice))
        assert results == [[Result.SUCCESS, Result.ALREADYSH]] * 40
        assert (carol.frames == shared).all()
        assert client.unmerge(carol.actor.key, carol.address, 40)[0] == 40
    carol.verify()


def test_many_reloads_while_pages_come_and_go(stage: Stage, module: Module) -> None:
    regions = [stage.start().region(20, SEED) for _ in range(2)]
    for round_number in range(5):
        module.reload()
        with Client() as client:
            client.merge(*pairs(*regions))
            assert client.info().shared_pages == 20
        module.unload()
        regions[round_number % 2].actor.ask("fill", regions[round_number % 2].address, 10, SEED)
        module.load()
        with Client() as client:
            info = client.info()
            assert (info.shared_pages, info.shared_mappings) == (20, 30)
    for region in regions:
        region.verify()


def test_processes_end_after_the_module(stage: Stage, module: Module) -> None:
    """The last mapping frees a shared page, whoever made it."""
    alice, bob = (stage.start().region(500, SEED) for _ in range(2))
    with Client() as client:
        client.merge(*pairs(alice, bob))
    shared = alice.frames.tolist()
    module.unload()
    alice.actor.exit()
    assert frames.map_count(shared[0]) == 1
    bob.actor.exit()
    assert [frames.map_count(frame) for frame in shared] == [0] * 500
    module.load()
    with Client() as client:
        assert client.info().shared_pages == 0


def test_memory_comes_back(stage: Stage, client: Client) -> None:
    """64 MiB in four processes: merging frees three quarters, the end of all frees the rest."""
    pages = 4000
    actors = [stage.start() for _ in range(4)]
    # Each has been through the same before, so that its counters are where they settle.
    for actor in actors:
        actor.ask("munmap", actor.region(pages, SEED).address, pages)
    rss = [(actor.status("RssAnon"), actor.status("RssFile")) for actor in actors]
    before = settled_free_pages()
    regions = [actor.region(pages, SEED) for actor in actors]
    assert abs(before - settled_free_pages() - 4 * pages) < SLACK_PAGES
    for start in range(0, pages, 1000):
        results = client.merge(*pairs(*regions)[start : start + 1000])
        assert results == [[Result.SUCCESS] * 4] * 1000
    assert abs(before - settled_free_pages() - pages) < SLACK_PAGES
    assert client.info().shared_mappings == 4 * pages
    for region in regions:
        region.verify()
        region.actor.ask("munmap", region.address, pages)
    assert abs(before - settled_free_pages()) < SLACK_PAGES
    assert client.info().shared_pages == 0
    # Counters of a process are exact once it has passed through the kernel a few times.
    for actor, (anonymous, file) in zip(actors, rss, strict=True):
        assert abs(actor.status("RssAnon") - anonymous) <= 128
        assert abs(actor.status("RssFile") - file) <= 128
        # The kernel itself says "Bad rss-counter" at the end of a process that is off by one.
        actor.exit()


def test_no_frame_leaks_over_many_rounds(stage: Stage, client: Client) -> None:
    """Merge, write, unmerge, exit, many times: 32,000 pages pass through, and none stays."""
    before = settled_free_pages()
    for _ in range(8):
        regions = [stage.start().region(1000, SEED, period=500) for _ in range(2)]
        groups = [[r[n + at] for r in regions for at in (0, 500)] for n in range(500)]
        assert set(flat(client.merge(*groups))) == {Result.SUCCESS}
        regions[0].actor.ask("fill", regions[0].address, 500, SEED)
        client.unmerge(regions[1].actor.key, regions[1].address, 500)
        client.merge(*groups)
        for region in regions:
            region.verify()
            region.actor.exit()
    assert abs(before - settled_free_pages()) < SLACK_PAGES


def start_client(payload: bytes, requests: int = 1) -> int:
    """A client that is stopped right before its MERGE requests; its pid."""
    child = os.fork()
    if not child:
        # No exit handlers, no pytest: this process merges, and may get killed.
        try:
            with Client() as victim:
                assert victim.family
                os.kill(os.getpid(), signal.SIGSTOP)
                for _ in range(requests):
                    victim.request(Command.MERGE, payload)
        finally:
            os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    return child


def test_client_killed_in_the_middle_of_a_merge(stage: Stage, client: Client) -> None:
    """What was merged by then is merged well, the rest is untouched, and others can go on."""
    pages = 2000
    alice, bob = (stage.start().region(pages, SEED) for _ in range(2))
    payload = merge_payload(pairs(alice, bob))
    partial = 0

    def killed_in_the_middle(delay_seconds: float) -> bool:
        child = start_client(payload)
        os.kill(child, signal.SIGCONT)
        time.sleep(delay_seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        same = int((alice.frames == bob.frames).sum())
        info = client.info()
        # Of a group, one may have joined the copy before the other was reached.
        assert info.shared_pages <= info.shared_mappings <= 2 * pages
        assert info.shared_mappings >= 2 * same
        alice.verify()
        bob.verify()
        for region in (alice, bob):
            client.unmerge(region.actor.key, region.address, pages)
        assert client.info().shared_pages == 0
        return 0 < info.shared_mappings < 2 * pages

    # The moment is a matter of luck and of the host's speed; so try many, with a deadline.
    deadline = time.monotonic() + DEADLINE_SECONDS
    for attempt in itertools.count():
        # From 1 ms to 1 s, and again.
        partial += killed_in_the_middle(1.2 ** (attempt % 39) / 1000)
        assert time.monotonic() < deadline or partial, "no request was ever met in the middle"
        if partial >= 5:
            break
    assert set(client.request(Command.MERGE, payload)[0][Attribute.RESULTS]) == {Result.SUCCESS}


def test_processes_killed_in_the_middle_of_a_merge(stage: Stage, client: Client) -> None:
    regions = [stage.start().region(1000, SEED) for _ in range(2)]
    for delay_us in range(0, 30000, 2000):
        victim = stage.start().region(1000, SEED)
        killer = subprocess.Popen(
            ["sh", "-c", f"sleep {delay_us / 1e6}; kill -9 $0", str(victim.actor.pid)]
        )
        merged = client.merge(*pairs(regions[0], victim, regions[1]))
        killer.wait()
        victim.actor.wait()
        for mine, _, yours in merged:
            assert {mine, yours} <= {Result.SUCCESS, Result.ALREADYSH}
        assert (regions[0].frames == regions[1].frames).all()
        # The last reference on a victim's memory may be the request's, which it drops at leisure.
        wait_until(lambda: client.info().shared_mappings == 2000, "the victim's mappings are gone")
        assert client.info().shared_pages == 1000
        for region in regions:
            region.verify()
            client.unmerge(region.actor.key, region.address, 1000)


def test_module_in_use_cannot_be_unloaded_half_way(stage: Stage, module: Module) -> None:
    """rmmod waits for a request in flight, or fails; never does it pull the code away."""
    regions = [stage.start().region(1900, SEED) for _ in range(2)]
    payload = merge_payload(pairs(*regions))
    for _ in range(5):
        if not module.loaded:
            module.load()
        child = start_client(payload, requests=3)
        os.kill(child, signal.SIGCONT)
        wait_until(
            lambda: (
                subprocess.run(["rmmod", "mergemem"], stderr=subprocess.DEVNULL).returncode == 0
            ),
            "the module is unloaded",
        )
        os.waitpid(child, 0)
        for region in regions:
            region.verify()
            region.actor.ask("fill", region.address, 950, SEED)
    module.load()
    with Client() as client:
        assert np.isin(client.records(regions[0])["state"], [State.ANON, State.MERGED]).all()
