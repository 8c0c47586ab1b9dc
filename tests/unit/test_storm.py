# SPDX-License-Identifier: MIT
"""Processes that come and go, thousands of them: what the scan keeps and does is bounded."""

from __future__ import annotations

import sys
import time
from types import FrameType
from typing import Any

import numpy as np
import pytest

from mergemem_agent import outcome
from mergemem_agent.contract import DEPTH_FULL_BYTES, DEPTH_SAMPLE_BYTES
from mergemem_agent.pipeline import Pipeline
from mergemem_agent.prior import _ASSUMED_SHARE
from mergemem_agent.region import REGION_PAGES
from mergemem_agent.targets import Pool
from mergemem_agent.word import Stage
from tests.unit.synthetic import Host, policy

FIRST_PID = 1 << 23  # no real process has it: the agent leaves itself alone
SETTLE_SECONDS = 1000.0  # nothing settles here: looks and searches are all there is


def sync_and_round(host: Host, pipeline: Pipeline) -> None:
    pipeline._synced = -float("inf")
    host.round(pipeline)


def test_who_lives_shortly_is_never_scanned() -> None:
    host = Host()
    for pid in (1, 2):
        host.start(pid, np.arange(1, REGION_PAGES + 1))
    pipeline = host.pipeline(policy(SETTLE_SECONDS))
    for wave in range(6):
        pids = range(FIRST_PID + 1000 * wave, FIRST_PID + 1000 * wave + 500)
        for pid in pids:
            host.start(pid, np.arange(1, REGION_PAGES + 1), age_seconds=0.0)
        sync_and_round(host, pipeline)
        assert len(pipeline.targets) == 2 + len(pids)
        for pid in pids:
            host.end(pid)
    sync_and_round(host, pipeline)
    assert len(pipeline.targets) == 2
    assert host.mappings_read == 2
    assert {pid for pid, _, _ in host.looks} == {1, 2}


def test_nothing_is_kept_of_who_has_gone() -> None:
    host = Host()
    pipeline = host.pipeline(policy(SETTLE_SECONDS))
    for wave in range(4):
        pids = range(FIRST_PID + 1000 * wave, FIRST_PID + 1000 * wave + 200)
        for pid in pids:
            host.start(pid, np.arange(1, REGION_PAGES + 1))
        sync_and_round(host, pipeline)
        assert pipeline.memory()["all"].remembered_pages == len(pids) * REGION_PAGES
        for pid in pids:
            host.end(pid)
    sync_and_round(host, pipeline)
    queue, flow = pipeline.queue, pipeline.counts.flow
    assert not queue._tracked
    assert not pipeline._news
    assert [flow.held(stage) for stage in Stage] == [0] * len(Stage)
    # Of mappings that are to be read, the heap forgets the dead when their turn comes.
    assert len(queue._to_read) <= 4 * 200
    assert len(queue._siblings) <= 1


def merge_all(host: Host, pipeline: Pipeline) -> None:
    pages = sum(len(memory.contents) for memory in host.memories.values())
    for _ in range(100):
        sync_and_round(host, pipeline)
        if host.merged_pages() == pages:
            return
        time.sleep(0.02)
    raise AssertionError(f"{host.merged_pages()} of {pages} pages were merged")


def test_a_new_worker_whose_siblings_merged_well_is_read_in_full_at_once() -> None:
    host = Host()
    pages = 4 * REGION_PAGES
    for pid in (1, 2, 3):
        host.start(pid, np.arange(1, pages + 1))
    pipeline = host.pipeline(policy(0.05))
    merge_all(host, pipeline)
    assert (host.read[DEPTH_SAMPLE_BYTES], host.read[DEPTH_FULL_BYTES]) == (3 * pages, 6 * pages)
    # Then a worker comes that is like them.
    host.start(4, np.arange(1, pages + 1))
    merge_all(host, pipeline)
    assert (host.read[DEPTH_SAMPLE_BYTES], host.read[DEPTH_FULL_BYTES]) == (3 * pages, 8 * pages)


def test_pages_that_are_on_their_way_do_not_speak_against_their_siblings() -> None:
    """What has had no time to merge yet must not have the same regions of others look worthless."""
    host = Host()
    for pid in (1, 2):
        host.start(pid, np.arange(1, REGION_PAGES + 1))
    pipeline = host.pipeline(policy(SETTLE_SECONDS))
    for _ in range(5):
        sync_and_round(host, pipeline)
        for target in pipeline.targets:  # as after a hint
            target.regions.rows["sample"] = 0.0
            target.regions.schedule(time.monotonic(), SETTLE_SECONDS)
    assert host.read[DEPTH_FULL_BYTES] == 2 * REGION_PAGES
    for target in pipeline.targets:
        siblings = pipeline.queue._siblings[target.pool]
        assert min(siblings.share(target.regions.rows["number"])) >= 0.99 * _ASSUMED_SHARE


def test_a_pool_that_ends_while_it_is_searched_teaches_nothing() -> None:
    """Its last process may end at any pace, and be noticed after any request."""
    host = Host()
    pages = np.arange(1, REGION_PAGES + 1)
    for pid in (1, 2):
        host.start(pid, pages)
    pipeline = host.pipeline(policy(0.05))
    remember = outcome.remember
    ended = False

    def end_all(*arguments: Any) -> None:
        nonlocal ended
        remember(*arguments)
        for target in pipeline.targets:
            pipeline.targets.forget(target)
        ended = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome, "remember", end_all)
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            host.round(pipeline)
    assert ended
    assert not len(pipeline.targets)
    assert not pipeline.queue._siblings


def test_a_pool_that_ends_while_others_are_searched_is_not_searched() -> None:
    host = Host()
    for pid in (1, 2):
        host.start(pid, np.arange(1, REGION_PAGES + 1))
    pipeline = host.pipeline(policy(SETTLE_SECONDS))
    sync_and_round(host, pipeline)
    pool = next(iter(pipeline.targets)).pool
    pipeline._news.add(pool, samples=1)

    def end_all() -> list[tuple[Pool, bool]]:
        for target in pipeline.targets:
            pipeline.targets.forget(target)
        return [(pool, True)]

    pipeline._searches = end_all  # type: ignore[method-assign]
    host.round(pipeline)
    assert not len(pipeline.targets)


def test_memory_that_always_changes_speaks_against_its_siblings() -> None:
    """It never comes to rest, and has shown all the same that nothing of it merges."""
    host = Host()
    host.start(1, np.arange(1, REGION_PAGES + 1))
    pipeline = host.pipeline(policy(0.01))
    (memory,) = host.memories.values()
    for change in range(6):
        memory.contents[7] = 10_000 + change
        sync_and_round(host, pipeline)
        for target in pipeline.targets:  # as after a hint
            target.regions.rows["sample"] = 0.0
            target.regions.schedule(time.monotonic(), 0.01)
    (target,) = pipeline.targets
    siblings = pipeline.queue._siblings[target.pool]
    assert max(siblings.share(target.regions.rows["number"])) < 0.5 * _ASSUMED_SHARE


def calls(work: list[int], host: Host, pipeline: Pipeline) -> int:
    """Return how many calls of functions a round makes in which nothing is due."""
    for _ in range(10):
        sync_and_round(host, pipeline)
    pipeline.memory()
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        host.round(pipeline)
        pipeline.idle_seconds()
        pipeline.memory()
        pipeline.queue.state()
    finally:
        sys.setprofile(None)
    work.append(count)
    return count


def test_a_calm_round_costs_next_to_nothing_for_each_process() -> None:
    counts: list[int] = []
    for processes in (100, 1100):
        host = Host()
        for pid in range(FIRST_PID, FIRST_PID + processes):
            host.start(pid, np.arange(1, 9))
        pipeline = host.pipeline(policy(SETTLE_SECONDS))
        calls(counts, host, pipeline)
    few, many = counts
    assert (many - few) / 1000 <= 16, "calls for each process"
