# SPDX-License-Identifier: MIT
"""Two NUMA nodes: pages share a frame of their own node, unless a request says otherwise.

All processors of the guest belong to node 0, so that only memory bound to node 1 is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel import frames, nodes, race
from tests.kernel.actor import Page, Region, Stage
from tests.kernel.contract import Result
from tests.kernel.sharing import flat, pairs, write_privately
from tests.kernel.wire import Client
from tests.kernel.writers import Writers, merge_equal

PAGES, SEED = 8, 140
RACE_SECONDS = 5
SUCCESS, NODE = Result.SUCCESS, Result.NODE
BALANCING = Path("/proc/sys/kernel/numa_balancing")
SCANNING = Path("/sys/kernel/debug/sched/numa_balancing")


@pytest.fixture(scope="module", autouse=True)
def two_nodes() -> None:
    """The rig gives the guest a second node of memory."""
    assert nodes.with_memory() == [0, 1]


def on_node(node: int, stage: Stage, pages: int = PAGES, seed: int = SEED) -> Region:
    return nodes.region_on(stage.start(), node, pages, seed)


def test_each_node_for_itself(stage: Stage, client: Client) -> None:
    near = [on_node(0, stage) for _ in range(2)]
    far = [on_node(1, stage) for _ in range(2)]
    groups = pairs(near[0], far[0], near[1], far[1])
    assert client.merge(*groups) == [[SUCCESS] * 4] * PAGES
    for node, regions in enumerate((near, far)):
        for group in pairs(*regions):
            frames.assert_shared(group)
        for region in regions:
            assert nodes.of(region) == [node] * PAGES
            region.verify()
    assert client.info().shared_pages == 2 * PAGES
    write_privately(far[0], 1, far[1])
    write_privately(near[1], 1, near[0])


def test_alone_on_its_node(stage: Stage, client: Client) -> None:
    near = [on_node(0, stage) for _ in range(2)]
    far = on_node(1, stage)
    before = far.frames
    assert client.merge(*pairs(near[0], near[1], far)) == [[SUCCESS, SUCCESS, NODE]] * PAGES
    assert (far.frames == before).all()
    assert nodes.of(far) == [1] * PAGES
    # Left as it was: still writable, without a fault.
    faults = far.actor.minor_faults()
    far.actor.ask("flip", far.address, PAGES, 1)
    assert far.actor.minor_faults() == faults


def test_two_pages_on_two_nodes(stage: Stage, client: Client) -> None:
    near, far = on_node(0, stage), on_node(1, stage)
    before = near.frames.tolist() + far.frames.tolist()
    results = client.merge(*pairs(near, far))
    assert set(flat(results)) <= {Result.ALONE, NODE}
    assert {yours for _, yours in results} == {NODE}
    assert near.frames.tolist() + far.frames.tolist() == before
    assert client.info().shared_pages == 0
    near.verify()
    far.verify()


def test_any_node(stage: Stage, client: Client) -> None:
    far = [on_node(1, stage) for _ in range(2)]
    near = [on_node(0, stage) for _ in range(2)]
    groups = pairs(far[0], near[0], far[1], near[1])
    assert client.merge(*groups, any_node=True) == [[SUCCESS] * 4] * PAGES
    for group in groups:
        frames.assert_shared(group)
    for region in (*far, *near):
        assert len(set(nodes.of(region))) == 1
        region.verify()
    assert client.info().shared_pages == PAGES
    write_privately(near[0], 2, near[1], *far)


def test_the_frame_is_of_the_far_node(stage: Stage, client: Client) -> None:
    """Whoever asks runs on a processor of node 0; that must not matter."""
    far = [on_node(1, stage, pages=300) for _ in range(2)]
    before = far[0].frames
    assert set(flat(client.merge(*pairs(*far)))) == {SUCCESS}
    assert not set(far[0].frames) & set(before)
    assert nodes.of(far[0]) == nodes.of(far[1]) == [1] * 300


def test_joining_a_merged_page(stage: Stage, client: Client) -> None:
    far = [on_node(1, stage) for _ in range(2)]
    near = on_node(0, stage)
    client.merge(*pairs(*far))
    before = near.frames
    for newcomer, merged in client.merge(*pairs(near, far[0])):
        assert newcomer in (NODE, Result.ALONE)
        assert merged in (NODE, Result.ALONE, Result.ALREADYSH)
    assert (near.frames == before).all()
    assert (
        client.merge(*pairs(near, far[0]), any_node=True) == [[SUCCESS, Result.ALREADYSH]] * PAGES
    )
    for group in pairs(near, *far):
        frames.assert_shared(group)
    near.verify()


def test_merged_pages_of_two_nodes(stage: Stage, client: Client) -> None:
    """A newcomer goes to the one of its node, wherever that stands in the request."""
    near = [on_node(0, stage) for _ in range(3)]
    far = [on_node(1, stage) for _ in range(3)]
    client.merge(*pairs(*near[:2]))
    client.merge(*pairs(*far[:2]))
    results = client.merge(*pairs(near[0], far[0], far[2], near[2]))
    for group in results:
        assert group[2:] == [SUCCESS, SUCCESS], group
    assert nodes.of(near[2]) == [0] * PAGES
    assert nodes.of(far[2]) == [1] * PAGES
    for regions in (near, far):
        for group_of_pages in pairs(*regions):
            frames.assert_shared(group_of_pages)
            for region in regions:
                region.verify()


def test_zero_pages_have_no_node(stage: Stage, client: Client) -> None:
    regions = [on_node(node, stage) for node in (0, 1)]
    for region in regions:
        region.actor.ask("clear", region.address, PAGES)
    pages: list[Page] = [page for region in regions for page in region]
    assert client.merge_zeros(*pages) == [Result.ZEROED] * len(pages)


def test_beside_pages_that_differ(stage: Stage, client: Client) -> None:
    """What fits neither is tried among itself, which comes to nothing here."""
    near = [on_node(0, stage, pages=1) for _ in range(2)]
    odd = on_node(0, stage, pages=1, seed=SEED + 1)
    far = on_node(1, stage, pages=1)
    (results,) = client.merge([near[0][0], odd[0], far[0], near[1][0]])
    assert [results[0], results[3]] == [SUCCESS, SUCCESS]
    assert set(results[1:3]) <= {Result.NOTEQUAL, NODE, Result.ALONE}
    frames.assert_shared([near[0][0], near[1][0]])
    assert nodes.of(far) == [1]
    odd.verify()
    far.verify()


@pytest.fixture
def balancing() -> Iterator[None]:
    """The kernel takes access away from pages to see who uses them, as often as it can."""
    eager = {"scan_delay_ms": "10", "scan_period_min_ms": "50", "scan_period_max_ms": "50"}
    before = {name: (SCANNING / name).read_text() for name in eager}
    for name, value in eager.items():
        (SCANNING / name).write_text(value)
    BALANCING.write_text("1")
    yield
    BALANCING.write_text("0")
    for name, value in before.items():
        (SCANNING / name).write_text(value)


@pytest.mark.usefixtures("balancing")
def test_while_the_kernel_balances(stage: Stage, client: Client) -> None:
    """Pages without access for a moment, pages that move: every byte stays right."""
    hinted = vmstat("numa_pte_updates")
    pages = 256
    regions = []
    for node in (0, 1):
        regions.append(on_node(node, stage, pages))
        # It leaves alone what is bound.
        regions[-1].actor.ask("mbind", regions[-1].address, pages, 0, 0, 0)
    writers = Writers(regions, threads=2)
    results: Counter[Result] = Counter()

    def met() -> bool:
        return vmstat("numa_pte_updates") > hinted and results[SUCCESS] > 100

    for _ in race.rounds(RACE_SECONDS, met, lambda: results):
        results.update(merge_equal(client, regions))
    writers.stop()
    print(dict(results), "hinted pages:", vmstat("numa_pte_updates") - hinted)


def vmstat(field: str) -> int:
    for line in Path("/proc/vmstat").read_text().splitlines():
        name, value = line.split()
        if name == field:
            return int(value)
    raise KeyError(field)
