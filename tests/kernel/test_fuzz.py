# SPDX-License-Identifier: MIT
"""Requests by the hundred thousand that are nearly right (fuzz.c), to a module that merges by some.

Whatever they ask for, the processes keep their bytes, and nothing is left over. Number of messages:
MERGEMEM_FUZZ_MESSAGES; seed: MERGEMEM_SEED, 0 for a new one each time.
"""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess

import pytest

from tests.kernel.actor import PROGRAM, Region, Stage
from tests.kernel.contract import Command, Result
from tests.kernel.wire import Client

MESSAGES = int(os.environ.get("MERGEMEM_FUZZ_MESSAGES", "40000"))
SEED = int(os.environ.get("MERGEMEM_SEED", "1"))
FUZZ = PROGRAM.with_name("fuzz")
THREADS = 2
PAGES, PERIOD = 256, 8


@pytest.fixture
def victims(stage: Stage) -> list[Region]:
    """Equal pages in three processes, of which one is the child of another; zeros; a huge page."""
    regions = []
    for _ in range(2):
        actor = stage.start()
        regions.append(actor.region(PAGES, 1, PERIOD))
        huge = actor.region(512, 2, PERIOD, kind="huge")
        regions.append(huge)
        actor.ask("clear", actor.map(PAGES), PAGES)
    child = regions[-1].actor.fork()
    return [*regions, *(region.of(child) for region in regions[-2:])]


def test_fuzz(victims: list[Region], client: Client) -> None:
    seed = SEED or random.randrange(1 << 32)
    print(f"MERGEMEM_SEED={seed}")
    before = client.info()
    words = [str(FUZZ), str(PROGRAM), str(MESSAGES), str(THREADS), str(seed)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    for region in victims:
        region.verify()
    after = client.info()
    results = {Result(n): count for n, count in enumerate(report["results"]) if count}
    errors = {os.strerror(n): count for n, count in enumerate(report["errors"]) if count}
    print(f"{dict(enumerate(report['asked']))}, {results}, {errors}")
    # Or it was no test: requests of all kinds were carried out, others refused.
    assert after.counters["merge_requests"] - before.counters["merge_requests"] > MESSAGES / 20
    assert after.counters["unmerged_pages"] > before.counters["unmerged_pages"]
    assert after.counters["checksummed_pages"] > before.counters["checksummed_pages"]
    assert after.counters["sampled_pages"] > before.counters["sampled_pages"]
    assert results[Result.SUCCESS] > MESSAGES / 100
    assert {Result.NOTASK2, Result.NOPAGE2, Result.NOTEQUAL, Result.ALREADYSH} <= results.keys()
    assert report["errors"][errno.EINVAL] > MESSAGES / 10
    assert all(report["asked"][command] for command in Command)
    # All of it can be undone.
    for region in victims:
        while client.unmerge(region.actor.key, 4096, (1 << 35) - 2)[0]:
            pass
        region.verify()
    end = client.info()
    assert (end.shared_pages, end.shared_mappings) == (0, 0)
