# SPDX-License-Identifier: MIT
"""The promise of index.py: at most 10 bytes of agent memory per page scanned, at the peak."""

import tracemalloc

import numpy as np
import pytest

from mergemem_agent.contract import RECORD, State
from mergemem_agent.info import Limits
from mergemem_agent.look import Wanted
from mergemem_agent.policy import MergeRules
from mergemem_agent.region import REGION_PAGES, Regions
from mergemem_agent.search import search
from mergemem_agent.window import Stretch, Window
from tests.bench.index_memory import measure

PROCESSES = 8
LIMITS = Limits(1024, 4000, 16384, 4096, 0)


@pytest.mark.parametrize("duplicates", [0.0, 0.3, 1.0])
def test_at_most_ten_bytes_a_page(duplicates: float) -> None:
    result = measure(1_000_000, duplicates=duplicates)
    assert result.peak_bytes_per_page <= 10
    # Something was looked for, and found: of all pages that have a duplicate, nearly all.
    assert result.nominated >= duplicates * 0.9 * result.pages


def fleet(regions_each: int, order: int) -> list[Regions]:
    """Return what is remembered of siblings: half of each one's pages are all the others', too."""
    random = np.random.default_rng(1)
    common = random.integers(2**63, size=(regions_each, REGION_PAGES), dtype=np.uint64)
    processes = []
    for _ in range(PROCESSES):
        regions = Regions()
        regions.replace(np.arange(regions_each, dtype=np.uint64))
        for row in range(regions_each):
            own = random.integers(2**63, size=REGION_PAGES, dtype=np.uint64)
            records = np.zeros(REGION_PAGES, dtype=RECORD)
            records["checksum"] = np.where(np.arange(REGION_PAGES) % 2, common[row], own)
            records["state"], records["order"], records["map_count"] = State.HUGE, order, 1
            for now in (100.0, 110.0):
                Window([Stretch(regions, row, 1)]).look(records, now, 10.0, 4096, Wanted(huge=True))
        processes.append(regions)
    return processes


@pytest.mark.parametrize("order", [4, 9])
def test_huge_pages_are_in_the_promise(order: int) -> None:
    list(search(fleet(2, order), MergeRules(25), LIMITS))  # numpy imports what it needs
    tracemalloc.start()
    try:
        processes = fleet(250, order)
        pages = sum(regions.pages for regions in processes)
        nominated = sum(len(each.candidates) for each in search(processes, MergeRules(25), LIMITS))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert pages == PROCESSES * 250 * REGION_PAGES
    assert nominated >= 0.49 * pages
    assert peak_bytes / pages <= 10
