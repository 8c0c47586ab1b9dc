# SPDX-License-Identifier: MIT
"""In which order regions are looked at: the outer half of the scan's control loop.

Of all regions that are due, of all targets, those go first that promise most for their cost:

    score = expected pages merged / expected CPU seconds

    new region       expected = 512 * share                cost = 512 * sample + region
    known region     expected = news * share               cost = pages * sample + region
    partners         expected = first * success of first   cost = (first + second) * full
                              + second * success of second

(share, success and costs: prior.py; news: the running average of pages that were not what they
were, or all of them as long as nobody has looked twice.) A region that is due for two of these adds
them up. Neighbours of one process make a slice, one request to the kernel, and slices are ordered
by the sums of their regions.

So that none starves, every fourth slice goes to the one that waits longest, if it has been waiting
for longer than OVERDUE_SECONDS: the n-th in that row has 5 n others before it at most.

A slice that promises less than WORTH_PAGES for each CPU second is not worth the budget. It is
looked at all the same, since expectations can be wrong, but out of IDLE_SHARE of one CPU (scan.py),
or when it has been waiting for NEGLECT_SECONDS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mergemem_agent.prior import Costs, Siblings, Success
from mergemem_agent.region import REGION_PAGES
from mergemem_agent.schedule import NEGLECT_SECONDS, NEWS_UNKNOWN
from mergemem_agent.targets import Target

Array = np.ndarray[Any, np.dtype[Any]]

# One request: 32 MiB of address space.
SLICE_REGIONS: Final = 16
# One look: 128 MiB.
BATCH_REGIONS: Final = 64
OVERDUE_SECONDS: Final = 60.0
_OVERDUE_TURN: Final = 4

# 4,096 CPU seconds for a GiB.
WORTH_PAGES: Final = 64.0


@dataclass(frozen=True)
class Slice:
    """Neighbouring regions of one target that are due: `count` rows of its table from `first`."""

    target: Target
    first: int
    count: int
    sampled: bool = True  # samples of all pages are due
    straight: bool = False  # do not sample, read all of it in full
    cost_seconds: float = 0.0  # of CPU time, as expected
    worth: bool = True  # what it is expected to cost

    def goes_with(self, other: Slice) -> bool:
        """Tell whether one look does for both: in processes that share, and of like cost."""
        mine, yours = self.target, other.target
        return (
            self.straight is other.straight
            and self.worth is other.worth
            and mine.policy is yours.policy
            and mine.domain == yours.domain
        )


class Plan:
    """What is due at one moment, in order; a snapshot of numbers, not of rows."""

    def __init__(
        self,
        targets: Sequence[Target],
        siblings: Sequence[Siblings],
        success: Success,
        costs: Costs,
        now: float,
    ) -> None:
        """Order the regions of `targets` that are due; `siblings` are those of their pools."""
        self._targets = targets
        rows, of, share = _gather(targets, siblings, now)
        self._next = 0
        self._order: Array = np.zeros(0, dtype=np.intp)
        self._worth: Array = np.zeros(0, dtype=np.bool_)
        if not len(rows):
            return
        sampling = rows["sample"] <= now
        straight = (rows["looks"] == 0) & (share > costs.straight_share)
        expected, cost = _expectations(rows, share, sampling, straight, success, costs)
        starts = neighbours(rows["number"], of, sampling, straight)
        self._target = of[starts]
        self._number = rows["number"][starts]
        self._count = np.diff(starts, append=len(rows))
        self._sampled, self._straight = sampling[starts], straight[starts]
        self._cost = np.add.reduceat(cost, starts)
        score = np.add.reduceat(expected, starts) / self._cost
        due = np.minimum.reduceat(rows["due"], starts)
        waiting = np.where(due > 0, now - due, 0.0)
        self._worth = (score >= WORTH_PAGES) | (waiting > NEGLECT_SECONDS)
        self._order = _with_turns(score, waiting)

    def __len__(self) -> int:
        """Return how many slices are left."""
        return len(self._order) - self._next

    def peek(self) -> Slice | None:
        """Return the next slice, or None when it is not there any more."""
        index = int(self._order[self._next])
        target = self._targets[int(self._target[index])]
        number, count = int(self._number[index]), int(self._count[index])
        first = target.regions.find(number)
        if first is None:
            return None
        numbers = target.regions.rows["number"][first : first + count]
        if len(numbers) < count or int(numbers[-1]) != number + count - 1:
            return None
        return Slice(
            target,
            first,
            count,
            sampled=bool(self._sampled[index]),
            straight=bool(self._straight[index]),
            cost_seconds=float(self._cost[index]),
            worth=bool(self._worth[index]),
        )

    def drop_unworthy(self) -> bool:
        """Leave out all that is not worth the budget; False: there is nothing of the kind."""
        left = self._order[self._next :]
        worth = self._worth[left]
        if worth.all():
            return False
        self._order, self._next = left[worth], 0
        return True

    def skip(self) -> None:
        """Go on to the slice after the next."""
        self._next += 1


def _gather(
    targets: Sequence[Target], siblings: Sequence[Siblings], now: float
) -> tuple[Array, Array, Array]:
    """Return the rows that are due, the index of each one's target, and its expected share."""
    parts, shares, lengths = [], [], []
    for target, known in zip(targets, siblings, strict=True):
        rows = target.regions.rows
        rows = rows[rows["due"] <= now]
        parts.append(rows)
        lengths.append(len(rows))
        shares.append(known.share(rows["number"]))
    if not parts:
        return np.zeros(0), np.zeros(0, dtype=np.intp), np.zeros(0)
    of = np.repeat(np.arange(len(targets)), lengths)
    return np.concatenate(parts), of, np.concatenate(shares)


def _expectations(
    rows: Array, share: Array, sampling: Array, straight: Array, success: Success, costs: Costs
) -> tuple[Array, Array]:
    """Return the pages that each region is expected to save, and its CPU seconds."""
    new = rows["looks"] == 0
    pages = np.where(new, REGION_PAGES, rows["pages"])
    # At least a little of everything, so that a score is never 0 for all.
    unknown = rows["news"] == NEWS_UNKNOWN
    news = np.where(new, REGION_PAGES, np.where(unknown, pages, rows["news"]) + 0.01)
    first, second = rows["first"].astype(np.float64), rows["second"].astype(np.float64)
    expected = sampling * news * np.maximum(share, 0.001)
    expected += first * success.of_first + second * success.of_second
    cost = costs.region + (first + second) * costs.full
    cost += sampling * pages * np.where(straight, costs.full, costs.sample + costs.search)
    return expected, cost


def neighbours(numbers: Array, *kinds: Array) -> Array:
    """Return where slices start: neighbours that are the same in all `kinds`, SLICE_REGIONS each.

    `numbers` are those of regions, ascending for each process; so a process is one of the kinds.
    """
    new = np.ones(len(numbers), dtype=np.bool_)
    new[1:] = numbers[1:] - numbers[:-1] != 1
    for kind in kinds:
        new[1:] |= kind[1:] != kind[:-1]
    starts = np.flatnonzero(new)
    within = np.arange(len(numbers)) - np.repeat(starts, np.diff(starts, append=len(numbers)))
    cut: Array = np.flatnonzero(within % SLICE_REGIONS == 0)
    return cut


def _with_turns(score: Array, waiting: Array) -> Array:
    """Return the order by score, but with every fourth place for what waits longest."""
    order = np.argsort(-score, kind="stable")
    overdue = np.argsort(-waiting, kind="stable")
    overdue = overdue[waiting[overdue] > OVERDUE_SECONDS]
    if not len(overdue):
        return order
    # The place of each: by its score, or earlier by how long it waits.
    place = np.empty(len(order))
    place[order] = np.arange(len(order))
    turn = np.full(len(order), np.inf)
    turn[overdue] = np.arange(len(overdue)) * _OVERDUE_TURN - 0.5
    result: Array = np.argsort(np.minimum(place, turn), kind="stable")
    return result
