# SPDX-License-Identifier: MIT
"""The stages together, on real processes, with a model of the kernel module's contract."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mergemem_agent import pipeline, scan
from mergemem_agent.budget import Budget
from mergemem_agent.contract import DEPTH_FULL_BYTES, Result
from mergemem_agent.hint import ProcessEvents
from mergemem_agent.info import Limits
from mergemem_agent.module import AccessDenied, Module, ModuleMissing, Run
from mergemem_agent.policy import (
    AgentSettings,
    HugePages,
    NumaNodes,
    PolicySet,
)
from mergemem_agent.procfs import ProcessId
from mergemem_agent.region import Regions
from mergemem_agent.search import search
from mergemem_agent.zero import zero_requests
from tests.unit.scene import FOLIO_PAGES, PAGES, PROCESSES, ZEROS, ModelModule, Scene

Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at what promises nothing more often than a thousandth of the time allows."""
    monkeypatch.setattr(scan, "IDLE_SHARE", 0.1)


@pytest.fixture
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    # Half of the pages are the same in all processes, at the same place; the rest are unique.
    opened = Scene(
        ModelModule(getattr(request, "param", 1000)),
        lambda process, page: page if page % 2 else 1000 * (process + 1) + page,
    )
    yield opened
    opened.close()


SHARED = PAGES // 2
ALL_SHARED = PROCESSES * PAGES - (PROCESSES - 1) * SHARED


def test_everything_equal_is_merged_and_nothing_is_asked_twice(scene: Scene) -> None:
    scene.until_frames(ALL_SHARED)
    counts, memory = scene.pipeline.counts, scene.pipeline.memory()["scene"]
    # Whoever settles late joins by way of an anchor, which shares its frame already.
    assert set(counts.results) <= {Result.SUCCESS, Result.ALREADYSH}
    assert counts.results[Result.SUCCESS] == SHARED * PROCESSES
    assert counts.nominated == {"host": counts.results.total()}
    assert counts.freed_pages == SHARED * (PROCESSES - 1)
    asked = scene.module.requests
    scene.rounds(3)
    assert scene.module.requests == asked
    assert memory.targets >= PROCESSES


def test_saved_bytes_agree_with_the_frames(scene: Scene) -> None:
    scene.until(lambda: scene.pipeline.memory()["scene"].merged_pages == SHARED * PROCESSES)
    memory = scene.pipeline.memory()["scene"]
    assert memory.saved_bytes == pytest.approx(4096 * SHARED * (PROCESSES - 1))


def test_endless_scanning_keeps_nothing_from_being_merged(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is written to all the time, some region is always due."""
    hourly = AgentSettings(rescan_seconds=3600)
    policies = PolicySet(agent=hourly, policies=(scene.policy,))
    scene.pipeline.change_policies(policies, Budget(100.0, {}))
    scan, deadline = scene.pipeline._scan, time.monotonic() + 60

    def always_due(module: Module, limits: Limits) -> bool:
        assert time.monotonic() < deadline, "the round does not end"
        scan(module, limits)
        time.sleep(0.001)
        return True

    monkeypatch.setattr(scene.pipeline, "_scan", always_due)
    monkeypatch.setattr(pipeline, "SCAN_SECONDS", 0.1)
    scene.until_frames(ALL_SHARED)


def test_endless_syncs_keep_nothing_from_being_scanned(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small budget, reading /proc may take longer than the time to the next reading."""
    monkeypatch.setattr(scene.pipeline, "_sync_is_due", lambda: True)
    scene.until_frames(ALL_SHARED)


def test_a_process_may_end_in_the_middle_of_a_search(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages are among those that the search is about, and have found partners in it."""
    last = max(process.pid for process in scene.processes)
    searching, ended = [False], [False]

    def watched(*arguments: Any) -> Iterator[Any]:
        searching[0] = True
        yield from search(*arguments)
        searching[0] = False

    def events() -> ProcessEvents:
        if not searching[0] or ended[0]:
            return ProcessEvents()
        ended[0] = True
        return ProcessEvents(ended=frozenset([last]))

    def write_the_same() -> None:
        for process in scene.module.base:
            scene.module.write(process, 2, 10**6 + scene.pipeline.counts.rounds)

    def pace() -> None:
        scene.pipeline.follow_events()

    monkeypatch.setattr(pipeline, "search", watched)
    monkeypatch.setattr(scene.pipeline, "_events", events)
    scene.pace = pace
    deadline = time.monotonic() + 60
    while not ended[0]:
        assert time.monotonic() < deadline
        write_the_same()
        scene.rounds(1)
    scene.rounds(2)
    assert scene.pipeline.counts.results[Result.SUCCESS] > 0
    assert last not in {target.process.pid for target in scene.pipeline.targets}


def test_one_look_is_not_enough(scene: Scene) -> None:
    settle_slowly = replace(scene.policy, settle_seconds=1000)
    scene.pipeline.change_policies(PolicySet(policies=(settle_slowly,)), Budget(100.0, {}))
    counts = scene.pipeline.counts.policy("scene")
    scene.until(lambda: counts.checksummed > 0)
    scene.rounds(3)
    assert scene.module.requests == 0
    assert (counts.sampled, counts.checksummed) == (PAGES * PROCESSES, SHARED * PROCESSES)
    assert counts.settled == 0


def test_only_what_has_a_partner_is_read_in_full_and_only_equals_twice(scene: Scene) -> None:
    scene.module.same_samples = 4  # so that each page has a partner, by its sample
    scene.until_frames(ALL_SHARED)
    pages = PROCESSES * PAGES
    assert scene.module.read[DEPTH_FULL_BYTES] == pages + PROCESSES * SHARED
    scene.rounds(5)
    assert scene.module.read[DEPTH_FULL_BYTES] == pages + PROCESSES * SHARED


def test_what_is_unique_is_never_read_in_full(scene: Scene) -> None:
    scene.until_frames(ALL_SHARED)
    scene.rounds(5)
    assert scene.module.read[DEPTH_FULL_BYTES] == 2 * PROCESSES * SHARED


def test_a_page_that_is_written_to_joins_again_when_it_settles(scene: Scene) -> None:
    scene.until_frames(ALL_SHARED)
    process = next(iter(scene.module.base))
    scene.module.write(process, 1, 1)
    assert scene.module.frames == ALL_SHARED + 1
    scene.until_frames(ALL_SHARED)


@pytest.mark.parametrize("scene", [2], indirect=True)
def test_a_full_frame_is_left_for_a_new_one(scene: Scene) -> None:
    # Three equal pages, and two mappings a frame: the third page can share with nobody.
    scene.until_frames(PROCESSES * PAGES - SHARED)
    assert max(scene.module.map_counts().values()) == 2


def test_without_memory_merging_rests(scene: Scene) -> None:
    scene.module.answer = Result.NOMEM
    scene.until(lambda: scene.module.requests > 0)
    scene.rounds(3)
    assert scene.module.requests == 1
    assert scene.pipeline.counts.results[Result.NOMEM] > 0


@pytest.mark.parametrize("result", [Result.NOTEQUAL, Result.BUSY, Result.PINNED, Result.ALONE])
def test_what_fails_is_tried_again_later(scene: Scene, result: Result) -> None:
    scene.module.answer = result
    scene.until(lambda: scene.module.requests > 0)
    assert scene.module.frames == PROCESSES * PAGES
    scene.module.answer = None
    scene.until_frames(ALL_SHARED)


def test_a_round_may_end_after_any_slice(scene: Scene) -> None:
    class Over(Exception):
        pass

    slices = 0

    def end_after_few() -> None:
        nonlocal slices
        slices += 1
        if slices % 3 == 0:
            raise Over

    scene.pace = end_after_few
    deadline = time.monotonic() + 30
    while scene.module.frames > ALL_SHARED and time.monotonic() < deadline:
        try:
            scene.rounds(1)
        except Over:
            time.sleep(0.01)
    assert scene.module.frames == ALL_SHARED
    assert scene.pipeline.counts.results[Result.NOTEQUAL] == 0


def test_a_refused_process_is_dropped_and_the_others_are_merged(scene: Scene) -> None:
    refused = next(iter(scene.module.base))
    plain = scene.module.checksum

    def checksum(process: ProcessId, *arguments: Any, **named: Any) -> Iterator[Run]:
        if process == refused:
            raise AccessDenied("the kernel module says: not dumpable")
        return plain(process, *arguments, **named)

    scene.module.checksum = checksum  # type: ignore[method-assign]
    scene.until_frames(PROCESSES * PAGES - SHARED * (PROCESSES - 2))
    assert refused not in [target.process for target in scene.pipeline.targets]


def test_a_missing_module_ends_the_round(scene: Scene) -> None:
    def checksum(*_: object, **__: object) -> Iterator[Run]:
        raise ModuleMissing("the kernel module mergemem was unloaded")

    scene.module.checksum = checksum  # type: ignore[method-assign]
    with pytest.raises(ModuleMissing):
        scene.until(lambda: False)


def test_after_a_reload_of_the_module_nothing_is_remembered(scene: Scene) -> None:
    scene.until(lambda: scene.pipeline.memory()["scene"].remembered_pages > 0)
    scene.pipeline.forget_pages()
    assert scene.pipeline.memory()["scene"].remembered_pages == 0
    scene.until_frames(ALL_SHARED)


def test_domains_are_never_mixed() -> None:
    scene = Scene(ModelModule(), lambda _, page: page // 2)
    try:
        scene.pipeline.find_targets()
        for target in scene.pipeline.targets:
            target.domain = f"domain of {target.process.pid}"
        # Each page has one equal in its own process, and two in each of the others.
        scene.until_frames(PROCESSES * PAGES // 2)
        scene.rounds(3)
        owners = {(frame, process) for (process, _), frame in scene.module.frame.items()}
        assert len(owners) == scene.module.frames == PROCESSES * PAGES // 2
    finally:
        scene.close()


# --- zeros ---------------------------------------------------------------------------------------


@pytest.fixture
def zero_scene() -> Iterator[Scene]:
    """Each process has 100 pages of zeros; the others are unique."""
    opened = Scene(
        ModelModule(), lambda process, page: ZEROS if page < 100 else 1000 * (process + 1) + page
    )
    yield opened
    opened.close()


def test_zeros_are_replaced_across_domains_and_counted_apart(zero_scene: Scene) -> None:
    zero_scene.pipeline.find_targets()
    for target in zero_scene.pipeline.targets:
        target.domain = f"domain of {target.process.pid}"
    zero_scene.until(lambda: len(zero_scene.module.zeroed) == 100 * PROCESSES)
    counts = zero_scene.pipeline.counts
    assert set(counts.results) == {Result.ZEROED}
    assert counts.policies["scene"].zeroed == counts.zero_freed_pages == 100 * PROCESSES
    assert counts.freed_pages == counts.split_freed_pages == 0
    zero_scene.until(lambda: zero_scene.pipeline.memory()["scene"].zero_pages == 0)
    assert zero_scene.pipeline.memory()["scene"].saved_bytes == 0
    asked = zero_scene.module.requests
    zero_scene.rounds(3)
    assert zero_scene.module.requests == asked


def test_a_policy_may_leave_zeros_alone(zero_scene: Scene) -> None:
    without = replace(zero_scene.policy, zero_pages=False)
    zero_scene.pipeline.change_policies(PolicySet(policies=(without,)), Budget(100.0, {}))
    zero_scene.until(lambda: zero_scene.pipeline.memory()["scene"].zero_pages == 100 * PROCESSES)
    zero_scene.rounds(5)
    assert zero_scene.module.requests == 0


def test_a_process_may_end_while_its_zeros_are_replaced(
    zero_scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its table is still being read: it goes afterwards, not meanwhile."""
    targets_left, pages_meanwhile = list[int](), list[int]()

    def watched(processes: Sequence[Regions], *limits: int) -> Iterator[Any]:
        for request in zero_requests(processes, *limits):
            yield request
            targets_left.append(len(list(zero_scene.pipeline.targets)))
            pages_meanwhile.append(sum(regions.pages for regions in processes))

    def events() -> ProcessEvents:
        return ProcessEvents(ended=ended) if zero_scene.module.requests else ProcessEvents()

    def pace() -> None:
        zero_scene.pipeline.follow_events()

    ended = frozenset(process.pid for process in zero_scene.processes)
    monkeypatch.setattr(pipeline, "zero_requests", watched)
    monkeypatch.setattr(zero_scene.pipeline, "_events", events)
    zero_scene.pace = pace
    zero_scene.until(lambda: bool(targets_left))
    assert targets_left[0] == 0
    assert pages_meanwhile[0] == PROCESSES * PAGES
    assert zero_scene.pipeline.memory()["scene"].remembered_pages == 0


# --- huge pages ----------------------------------------------------------------------------------


@pytest.fixture
def huge_scene(scene: Scene) -> Scene:
    """As scene, but that the first 256 pages of each process are one large folio."""
    scene.module.limits = Limits(8, 4000, 100, 1000, 0)
    scene.module.folios = set(scene.module.base)
    return scene


def split(scene: Scene, percent: int) -> None:
    policy = replace(scene.policy, huge=HugePages.SPLIT, split_percent=percent)
    scene.pipeline.change_policies(PolicySet(policies=(policy,)), Budget(100.0, {}))


def test_huge_pages_are_split_and_merged(huge_scene: Scene) -> None:
    split(huge_scene, 25)
    huge_scene.until_frames(ALL_SHARED)
    counts = huge_scene.pipeline.counts
    assert counts.policies["scene"].split_folios == PROCESSES
    assert counts.split_freed_pages + counts.freed_pages == SHARED * (PROCESSES - 1)
    assert counts.split_freed_pages > 0
    assert {"any_node": False, "split_percent": 25} in huge_scene.module.asked


def test_without_a_word_huge_pages_stay_whole(huge_scene: Scene) -> None:
    small = (PAGES - FOLIO_PAGES) // 2
    huge_scene.until_frames(PROCESSES * PAGES - small * (PROCESSES - 1))
    huge_scene.rounds(3)
    assert huge_scene.module.folios == set(huge_scene.module.base)
    assert huge_scene.pipeline.memory()["scene"].huge_pages == FOLIO_PAGES * PROCESSES


def test_another_word_on_huge_pages_is_heeded_at_once(huge_scene: Scene) -> None:
    small = (PAGES - FOLIO_PAGES) // 2
    huge_scene.until_frames(PROCESSES * PAGES - small * (PROCESSES - 1))
    for target in huge_scene.pipeline.targets:  # as after hours of calm
        target.regions.rows["due"] = time.monotonic() + 1000
    split(huge_scene, 51)  # exactly half of the pages are equal
    huge_scene.until(lambda: bool(huge_scene.pipeline.memory()["scene"].huge_pages))
    huge_scene.rounds(3)
    assert huge_scene.module.folios == set(huge_scene.module.base)
    split(huge_scene, 50)
    huge_scene.until_frames(ALL_SHARED)


def test_below_the_share_huge_pages_stay_whole(huge_scene: Scene) -> None:
    split(huge_scene, 51)  # exactly half of the pages are equal
    small = (PAGES - FOLIO_PAGES) // 2
    huge_scene.until_frames(PROCESSES * PAGES - small * (PROCESSES - 1))
    huge_scene.rounds(3)
    assert huge_scene.module.folios == set(huge_scene.module.base)


# --- what requests are told ----------------------------------------------------------------------


def test_any_node_is_passed_on(scene: Scene) -> None:
    policy = replace(scene.policy, numa=NumaNodes.ANY)
    scene.pipeline.change_policies(PolicySet(policies=(policy,)), Budget(100.0, {}))
    scene.until_frames(ALL_SHARED)
    assert {asked["any_node"] for asked in scene.module.asked} == {True}


def test_what_lies_on_another_node_is_not_tried_at_once(scene: Scene) -> None:
    scene.module.answer = Result.NODE
    scene.until(lambda: scene.module.requests > 0)
    asked = scene.module.requests
    rows = [target.regions.rows for target in scene.pipeline.targets]
    before = {float(due) for table in rows for due in table["interval"]}
    scene.until(lambda: scene.module.requests > 2 * asked + 2)
    after = max(
        float(due) for target in scene.pipeline.targets for due in target.regions.rows["interval"]
    )
    assert after > max(before), "each time after a longer pause"


@pytest.mark.parametrize("whose", ["policy", "agent"])
def test_a_cap_is_kept_and_told(scene: Scene, whose: str) -> None:
    cap_bytes = 50 * 4096
    policy = replace(scene.policy, max_shared_bytes=cap_bytes if whose == "policy" else None)
    agent = AgentSettings(max_shared_bytes=cap_bytes if whose == "agent" else None)
    policies = PolicySet(agent=agent, policies=(policy,))
    scene.pipeline.change_policies(policies, Budget(100.0, {}))
    scene.until(lambda: len(scene.module.shared) == 50)
    scene.rounds(8)
    assert len(scene.module.shared) == 50
    assert scene.pipeline.counts.policies["scene"].capped > 0
    assert scene.pipeline.memory()["scene"].shared_bytes == pytest.approx(cap_bytes)
    # What joins a frame that is there takes none.
    frame = min(scene.module.shared)
    process, page = next(place for place, at in scene.module.frame.items() if at == frame)
    scene.module.write(process, page, scene.module.content[process, page])
    scene.until(lambda: scene.module.frame[process, page] == frame)
    assert len(scene.module.shared) == 50
