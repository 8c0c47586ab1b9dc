# SPDX-License-Identifier: MIT
"""Which zero-filled pages are sent to the kernel, and in what requests."""

from __future__ import annotations

import numpy as np
import pytest

from mergemem_agent.contract import GROUP_ZERO, RECORD, State
from mergemem_agent.look import Wanted
from mergemem_agent.region import REGION_PAGES, Regions
from mergemem_agent.window import Stretch, Window
from mergemem_agent.word import SETTLED
from mergemem_agent.zero import zero_requests


def zeros(numbers: list[int], pages: int, order: int = 0) -> Regions:
    """Return a process whose regions each begin with so many settled pages of zeros."""
    regions = Regions()
    regions.replace(np.array(numbers, dtype=np.uint64))
    records = np.zeros(REGION_PAGES, dtype=RECORD)
    records[:pages] = (9 << 40, 1, State.ZERO, order)
    records[pages] = (8 << 40, 1, State.ANON, 0)
    for row in range(len(numbers)):
        for now in (100.0, 110.0):
            Window([Stretch(regions, row, 1)]).look(
                records, now, 10.0, 4096, Wanted(huge=True, zero=True)
            )
    return regions


def test_only_settled_small_pages_are_sent() -> None:
    unsettled = zeros([4], 10)
    unsettled.mark(0, np.arange(3), 0, SETTLED)
    (request,) = zero_requests([unsettled, zeros([5], 10, order=9), zeros([6], 2)], 100, 8)
    assert request.processes == (0, 2)
    assert set(request.candidates["group"].tolist()) == {GROUP_ZERO}
    expected = [(4 << 21) + page * 4096 for page in range(3, 10)]
    expected += [(6 << 21) + page * 4096 for page in range(2)]
    assert request.candidates["address"].tolist() == expected


@pytest.mark.parametrize(("candidates", "processes"), [(1, 1), (7, 2), (100, 1), (4000, 1000)])
def test_requests_keep_to_the_limits(candidates: int, processes: int) -> None:
    owners = [zeros([1, 2, 9], 50) for _ in range(4)]
    sent = []
    for request in zero_requests(owners, candidates, processes):
        assert 1 <= len(request.candidates) <= candidates
        assert len(request.processes) <= processes
        named = np.array(request.processes)[request.candidates["process"]]
        sent += list(zip(named.tolist(), request.candidates["address"].tolist(), strict=True))
    assert len(sent) == len(set(sent)) == 4 * 3 * 50


def test_nothing_comes_of_nothing() -> None:
    assert not list(zero_requests([], 100, 8))
    assert not list(zero_requests([zeros([1], 0)], 100, 8))
