# SPDX-License-Identifier: MIT
"""The agent and every kind of page: huge pages, zeros, caps; and `mergemem unmerge`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.kernel import frames
from tests.kernel.actor import PAGE_BYTES, Region, Stage
from tests.kernel.agent import CHECKOUT, Agent, complaint, mergemem
from tests.kernel.cgroup import Cgroup
from tests.kernel.huge import HUGE_PAGES, huge_pages, setting
from tests.kernel.module import Module
from tests.kernel.sharing import merge_all, wait_until
from tests.kernel.wire import Client

SEED = 210


def policy(name: str, user: int, **keys: str) -> str:
    """One entry of a policy file."""
    said = {"settle": '"300ms"', "budget": '"100%"'} | keys
    lines = [f"    {key}: {value}" for key, value in said.items()]
    selector = f'{{executable: "**/build/actor", user: {user}}}'
    return "\n".join([f"  - name: {name}", f"    select: {selector}", *lines, ""])


def fleet(*entries: str) -> str:
    return "policies:\n" + "".join(entries)


def shared(*regions: Region) -> bool:
    """Whether all pages of the regions share their frames."""
    first = regions[0].frames
    return all(bool((region.frames == first).all()) for region in regions[1:])


def looked_again(agent: Agent, name: str, pages: int) -> None:
    """Wait until the agent has scanned all of it twice more."""

    def scanned() -> float:
        return agent.metrics().get(f'mergemem_scanned_pages_total{{policy="{name}"}}', 0)

    before = scanned()
    wait_until(lambda: scanned() > before + 2 * pages, "it has looked again")


# --- huge pages ----------------------------------------------------------------------------------


@pytest.fixture
def always() -> Iterator[None]:
    """Transparent huge pages as Debian has them."""
    with setting("", "always"):
        yield


@pytest.mark.usefixtures("always")
def test_huge_pages_are_split_where_the_policy_says_so(
    stage: Stage, client: Client, tmp_path: Path
) -> None:
    pages = 3 * HUGE_PAGES
    regions = [stage.start(1001).region(pages, SEED, kind="default") for _ in range(3)]
    huge = [huge_pages(region) for region in regions]
    assert min(huge) >= 2, "the kernel gives huge pages to whoever has room for them"

    with Agent(tmp_path, fleet(policy("fleet", 1001))) as agent:
        looked_again(agent, "fleet", 3 * pages)
        assert [huge_pages(region) for region in regions] == huge, "skip is the default"
        in_huge_pages = sum(huge) * HUGE_PAGES
        assert agent.metrics()['mergemem_huge_pages{policy="fleet"}'] >= in_huge_pages
        split_before = client.info().counters["split_folios"]

        agent.write_policies(fleet(policy("fleet", 1001, huge="split")))
        agent.reload()
        wait_until(lambda: shared(*regions), "all pages are shared")
        # The gain, and what it has cost, side by side. A snapshot is up to two seconds old.
        cost = 'mergemem_split_huge_pages_total{policy="fleet"}'
        wait_until(lambda: agent.metrics()[cost] == sum(huge), "the splits are counted")
        metrics = agent.metrics()
        agent.stop()
    assert [huge_pages(region) for region in regions] == [0, 0, 0]
    assert metrics["mergemem_module_split_folios_total"] == split_before + sum(huge)
    assert metrics["mergemem_split_freed_pages_total"] > 0
    for region in regions:
        region.verify()


@pytest.mark.usefixtures("always")
def test_below_the_share_huge_pages_stay_whole(stage: Stage, tmp_path: Path) -> None:
    """An eighth of each huge page is equal in both processes: too little."""
    pages = 3 * HUGE_PAGES
    regions = [
        stage.start(1001).region(pages, SEED + number, kind="default") for number in range(2)
    ]
    for region in regions:
        for start in range(0, pages, 8):
            region.actor.ask("fill", region[start].address, 1, SEED + 10 + start)
    huge = [huge_pages(region) for region in regions]
    assert min(huge) >= 2
    with Agent(tmp_path, fleet(policy("fleet", 1001, huge="split"))) as agent:
        looked_again(agent, "fleet", 2 * pages)
        assert [huge_pages(region) for region in regions] == huge
        agent.write_policies(fleet(policy("fleet", 1001, huge="split", split_share='"10%"')))
        agent.reload()
        wait_until(lambda: [huge_pages(region) for region in regions] == [0, 0], "they are split")
        agent.stop()


# --- zeros ---------------------------------------------------------------------------------------


def zero_pages(region: Region) -> int:
    return sum(frames.has_flag(int(frame), frames.KPF_ZERO_PAGE) for frame in region.frames)


def test_zeros_are_replaced_where_the_policy_lets_them(stage: Stage, tmp_path: Path) -> None:
    """Alice and Bob are different users, who share nothing else; Carol's policy says no."""
    alice, bob, carol = (stage.start(uid).region(300, SEED + uid) for uid in (1001, 1002, 1003))
    for region in (alice, bob, carol):
        region.actor.ask("clear", region.address, 200)
    policies = fleet(
        policy("alice", 1001), policy("bob", 1002), policy("carol", 1003, zero_pages="false")
    )
    with Agent(tmp_path, policies) as agent:
        wait_until(lambda: zero_pages(alice) == zero_pages(bob) == 200, "the zero page is theirs")
        looked_again(agent, "carol", 300)
        metrics = agent.metrics()
        agent.stop()
    assert zero_pages(carol) == 0
    assert len(np.unique(carol.frames)) == 300
    for name in ("alice", "bob"):
        assert metrics[f'mergemem_zeroed_pages_total{{policy="{name}"}}'] >= 200
        # What little the rest of their memory has in common is another figure.
        assert metrics[f'mergemem_saved_bytes{{policy="{name}"}}'] < 200 * PAGE_BYTES
    assert metrics.get('mergemem_zeroed_pages_total{policy="carol"}', 0) == 0
    assert metrics['mergemem_zero_pages{policy="carol"}'] >= 200


# --- caps ----------------------------------------------------------------------------------------


def test_the_cap_of_a_policy(stage: Stage, client: Client, tmp_path: Path) -> None:
    alice, bob = (stage.start(1001).region(600, SEED) for _ in range(2))
    with Agent(tmp_path, fleet(policy("fleet", 1001, max_shared='"1MiB"'))) as agent:
        wait_until(lambda: client.info().shared_pages == 256, "the cap is reached")
        looked_again(agent, "fleet", 1200)
        assert client.info().shared_pages == 256
        metrics = agent.metrics()
        agent.stop()
    assert metrics['mergemem_capped_pages_total{policy="fleet"}'] >= 2 * (600 - 256)
    assert metrics['mergemem_policy_shared_limit_bytes{policy="fleet"}'] == 1 << 20
    assert metrics['mergemem_policy_shared_bytes{policy="fleet"}'] == 1 << 20
    for region in (alice, bob):
        region.verify()


def test_the_cap_of_the_module(stage: Stage, module: Module, tmp_path: Path) -> None:
    alice, bob = (stage.start(1001).region(600, SEED) for _ in range(2))
    limit = 100 * PAGE_BYTES
    with (
        module.reloaded(max_shared_bytes=limit),
        Agent(tmp_path, fleet(policy("fleet", 1001))) as agent,
    ):
        nomem = 'mergemem_merged_pages_total{result="nomem"}'
        wait_until(lambda: agent.metrics()[nomem] > 0, "the module has refused")
        assert agent.metrics()["mergemem_module_shared_limit_bytes"] == limit
        assert agent.metrics()["mergemem_shared_pages"] <= 100
        agent.stop()
    for region in (alice, bob):
        region.verify()


# --- unmerge -------------------------------------------------------------------------------------


def test_unmerge_everything(stage: Stage, client: Client) -> None:
    alice, bob, carol = (stage.start(uid).region(400, SEED) for uid in (1001, 1001, 1001))
    child = alice.actor.fork()
    merge_all(client, alice, bob, carol)
    assert client.info().shared_pages
    said = mergemem("unmerge", "--all")
    assert "no page of this host is merged any more" in said
    assert (client.info().shared_pages, client.info().shared_mappings) == (0, 0)
    for region in (alice, bob, carol, alice.of(child)):
        region.verify()


def test_unmerge_a_range(stage: Stage, client: Client) -> None:
    alice, bob = (stage.start(1001).region(64, SEED) for _ in range(2))
    merge_all(client, alice, bob)
    pid, start = alice.actor.pid, alice.address
    middle = f"{start + 16 * PAGE_BYTES:x}-{start + 32 * PAGE_BYTES:x}"
    assert f"process {pid}: 16 pages" in mergemem("unmerge", pid, "--range", middle)
    assert ((alice.frames == bob.frames) == [*[True] * 16, *[False] * 16, *[True] * 32]).all()
    mergemem("unmerge", pid)
    assert not (alice.frames == bob.frames).any()


def test_what_a_cgroup_cannot_hold_is_refused_whole(stage: Stage, client: Client) -> None:
    pages = 2000
    group = Cgroup()
    alice, bob = (group.add(stage.start()).region(pages, SEED) for _ in range(2))
    merge_all(client, alice, bob)
    group.limit(group.pages + pages, swap=False)
    try:
        said = complaint("unmerge", "--all")
        assert "nothing was unmerged" in said
        assert group.path.name in said
        assert shared(alice, bob)
        assert client.info().shared_mappings == 2 * pages
        group.limit(None)
        mergemem("unmerge", "--all")
        assert client.info().shared_mappings == 0
    finally:
        for region in (alice, bob):
            region.actor.exit()
        group.remove()


def test_unmerge_can_be_interrupted(stage: Stage, client: Client) -> None:
    pages = 30_000
    alice, bob = (stage.start(1001).region(pages, SEED) for _ in range(2))
    for _ in range(5):
        mergemem("merge", alice.actor.pid, bob.actor.pid)
        assert client.info().shared_mappings >= 2 * pages
        command = [sys.executable, "-m", "mergemem_agent", "unmerge", "--all"]
        with subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.PIPE, text=True) as unmerge:
            wait_until(lambda: client.info().shared_mappings < 2 * pages, "it has begun")
            os.kill(unmerge.pid, signal.SIGINT)
            _, said = unmerge.communicate(timeout=120)
        if unmerge.returncode:
            break
    assert unmerge.returncode == 130
    assert "interrupted after" in said
    left = client.info().shared_mappings
    assert 0 < left < 2 * pages
    mergemem("unmerge", "--all")
    assert client.info().shared_mappings == 0
    for region in (alice, bob):
        region.verify()
