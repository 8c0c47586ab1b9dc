# SPDX-License-Identifier: MIT
"""`mergemem status`: what a person reads. Merges, splits and zeros are told apart."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from mergemem_agent import status
from mergemem_agent.contract import Feature, Result
from mergemem_agent.counts import Counts, PolicyCounts, PolicyMemory, ReloadState, Snapshot
from mergemem_agent.info import Counters, Info, Limits, Totals
from mergemem_agent.pressure import Level, PressureState
from mergemem_agent.scan import QueueState

MIB_PAGES = 256
RESULTS = dict.fromkeys(Result, 0) | {Result.SUCCESS: 99, Result.ZEROED: 77}
INFO = Info(
    contract_version=2,
    module_version="0.3.0",
    features=Feature.SPLIT,
    limits=Limits(1024, 4000, 16384, 4096, 64 << 20),
    counters=Counters(1, 2, 3, 4, 5, 6, RESULTS, split_folios=11, split_failures=3),
    totals=Totals(shared_pages=10 * MIB_PAGES, shared_mappings=40 * MIB_PAGES),
)
SNAPSHOT = Snapshot(
    agent_version="0.3.0",
    pid=4711,
    taken_at=0.0,
    counts=Counts(
        policies={"web": PolicyCounts(zeroed=77, split_folios=11, capped=5)},
        results=Counter(RESULTS),
        freed_pages=2 * MIB_PAGES,
        split_freed_pages=3 * MIB_PAGES,
        zero_freed_pages=5 * MIB_PAGES,
    ),
    memory={
        "web": PolicyMemory(4, 900, 60, 30.0 * 2**20, 10.0 * 2**20, 1 << 30, 7, 512),
        "idle": PolicyMemory(),
    },
    queue=QueueState(regions=20, due=5, dropped=0),
    reload=ReloadState(),
    budget_percent=5.0,
    pressure=PressureState(Level.CPU, None, 75.0),
    max_shared_bytes=None,
    user_seconds=1.0,
    system_seconds=2.0,
    module=INFO,
)


def test_the_module_tells_its_cap_its_splits_and_its_zeros() -> None:
    text = "\n".join(status._module_lines(INFO, ""))
    assert "10240 mappings share 2560 pages: 30.0 MiB saved" in text
    assert "shared pages take 10.0 MiB, cap 64.0 MiB" in text
    assert "77 zero pages replaced, 11 huge pages split, 3 in use" in text
    unlimited = replace(INFO, limits=replace(INFO.limits, max_shared_bytes=0))
    assert "no cap" in "\n".join(status._module_lines(unlimited, ""))


def test_features_are_told() -> None:
    assert "allow_cross_uid" not in "\n".join(status._module_lines(INFO, ""))
    other = replace(INFO, features=Feature.CROSS_UID)
    first = status._module_lines(other, "")[0]
    assert "allow_cross_uid" in first
    assert "no huge pages" in first


def test_gains_are_never_added_up() -> None:
    text = "\n".join(status._agent_lines(SNAPSHOT.as_dict(), ""))
    assert (
        "freed 512 pages (2.0 MiB) by merging; apart from that, 768 pages (3.0 MiB) by splitting "
        "11 huge pages, and 1280 pages (5.0 MiB) of zeros" in text
    )
    assert "cap" not in text.split("policy", 1)[0]
    capped = replace(SNAPSHOT, max_shared_bytes=16 << 20).as_dict()
    assert "shared pages take 10.0 MiB, cap 16.0 MiB" in "\n".join(status._agent_lines(capped, ""))


def test_the_table_has_a_line_for_each_policy() -> None:
    lines = status._agent_lines(SNAPSHOT.as_dict(), "")
    heading, web, idle = (line.split() for line in lines[-3:])
    assert heading[0] == "policy"
    row = dict(zip(heading, " ".join(web).replace(" MiB", "MiB").split(), strict=True))
    assert row == {
        "policy": "web", "targets": "4", "pages": "900", "merged": "60", "saved": "30.0MiB",
        "shared": "10.0MiB", "cap": "1024.0MiB", "zeros": "7", "zeroed": "77", "huge": "512",
        "split": "11",
    }  # fmt: skip
    assert idle[0] == "idle"
    assert "-" in idle


def test_a_running_agent_is_one_that_lives(tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    assert status.running_agent(file) is None
    for pid, taken_at, expected in (
        (os.getpid(), time.time(), os.getpid()),
        (os.getpid(), time.time() - 3600, None),
        (2**22 + 1, time.time(), None),  # beyond the largest pid
    ):
        file.write_text(f'{{"pid": {pid}, "taken_at": {taken_at}}}')
        assert status.running_agent(file) == expected
