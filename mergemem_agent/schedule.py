# SPDX-License-Identifier: MIT
"""When a region is looked at next, and how: the inner half of the scan's control loop.

A look does two things, each when it is due: it takes samples of all pages, and it reads those pages
in full that have a partner.

    samples      `REVISIT` times `settle` after the first, then each time after twice as long, up to
                 MAX_INTERVAL_SECONDS, whether the region never changes or changes always: neither
                 yields anything. A change after calm, and a merge, start over.
    full, first  at once, when the search has found a partner
    full, second `settle` after the first
    zeros        the second sight `settle` after the first

A region whose merges break gets a longer `settle`: twice as long each time that a look finds more
than BREAKAGE of its merged pages written to, up to 16 times; a look that finds less takes a quarter
of such a step back.

    restless = min(4, restless + 1)  or  max(0, restless - 1/4)
    settle of the region = settle * 2 ** ceil(restless)

So that less is merged that will break, `restless` is 1 at least where more than BREAKAGE of the
pages of a region differ when they are read in full again, and more than a few: the others are
likely to be written to as well, only less often.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# A region is never left alone for longer, whatever the yield.
MAX_INTERVAL_SECONDS: Final = 1800.0
# What is due and promises nothing waits no longer than this.
NEGLECT_SECONDS: Final = 1800.0

_MIN_INTERVAL_SECONDS: Final = 0.05

# Looks that are due at about the same time are put off to the same time.
MAX_TICK_SECONDS: Final = 0.5
_TICK_SHARE: Final = 1 / 4
_LEAST_TICK_SECONDS: Final = 1e-3

# Hints tell of most that happens before.
REVISIT: Final = 8.0
BREAKAGE: Final = 0.05
_MOST_RESTLESS: Final = 4.0
_CALMER: Final = 0.25
_FEW_PAGES: Final = 8

# Hints put off a region this often, at most, before it is looked at.
MAX_HINTS: Final = 6

# How much of the average of news is forgotten with each look.
_NEWS_DECAY: Final = 0.5

# Of a region that was not looked at twice yet.
NEWS_UNKNOWN: Final = -1.0

# Timers and clocks round: a look that was due after 10 s may come after 9.9999 s.
CLOCK_TOLERANCE: Final = 0.999

_NEVER: Final = np.inf


def settle_of(rows: Array, settle: float) -> Array:
    """Return how long pages of each region have to stay the same, in seconds."""
    longer: Array = settle * np.exp2(np.ceil(rows["restless"].astype(np.float64)))
    return longer


def apart(rows: Array, now: float, settle: float) -> Array:
    """Return for each region whether its full checksums, and its zeros, are `settle` old.

    An array of bool of two columns.
    """
    before = now - settle_of(rows, settle) * CLOCK_TOLERANCE
    told = np.maximum(rows["read"], rows["sampled"])
    return np.stack([rows["read"] <= before, told <= before], axis=1)


def have_shown(rows: Array, settle: float) -> Array:
    """Return which regions have shown how much of them merges, just after samples were taken.

    Those of which half has merged, and those in which no page is on its way: none has a partner,
    none was just read in full, which may have got one without anybody having searched, and there
    was no change after calm. Memory that changes at each look is never calm, and has shown it.
    """
    own = settle_of(rows, settle)
    on_its_way = (rows["first"] > 0) | (rows["second"] > 0)
    on_its_way |= rows["sampled"] - rows["read"] <= own
    on_its_way |= rows["changed"] & (rows["interval"] * CLOCK_TOLERANCE <= own * REVISIT)
    half = (rows["merged"] > 0) & (rows["merged"] * 2 >= rows["pages"])
    shown: Array = half | ~on_its_way
    return shown


def after_movement(rows: Array, again: Array, differ: Array) -> None:
    """Give regions more time in which many pages `differ`, of those that were read `again`."""
    moving = differ > np.maximum(BREAKAGE * again, _FEW_PAGES)
    rows["restless"] = np.where(moving, np.maximum(rows["restless"], 1), rows["restless"])


def after_look(
    rows: Array,
    changed: Array,
    broken: Array,
    merged_before: Array,
    now: float,
    settle: float,
    sampled: Array,
) -> None:
    """Say when to look at each region next; `sampled` tells of which ones samples were taken.

    The other arrays count pages.
    """
    often = broken > BREAKAGE * merged_before
    calmer = np.maximum(rows["restless"] - _CALMER, 0)
    calm = np.where(merged_before > 0, calmer, rows["restless"])
    rows["restless"] = np.where(often, np.minimum(rows["restless"] + 1, _MOST_RESTLESS), calm)

    own = settle_of(rows, settle)
    if sampled.any():
        _after_samples(rows, changed, now, own, sampled)
    if not sampled.all():
        # Pages that came meanwhile are worth a sample, unless they are zeros that nobody wants.
        sooner = np.where(~sampled & (changed > rows["zero"]), now + own, _NEVER)
        rows["sample"] = np.minimum(rows["sample"], sooner)
    rows["looks"] += 1
    _set_due(rows, now, settle)


def _after_samples(rows: Array, changed: Array, now: float, own: Array, sampled: Array) -> None:
    """Say when to take samples again, where they were taken."""
    new = rows["looks"] == 0
    start_over = new | ((changed > 0) & ~rows["changed"])
    least = np.maximum(own * REVISIT, _MIN_INTERVAL_SECONDS)
    doubled = np.minimum(rows["interval"] * 2, np.maximum(MAX_INTERVAL_SECONDS, least))
    interval = np.where(start_over, least, np.maximum(doubled, least))
    average = rows["news"] + (changed - rows["news"]) * _NEWS_DECAY
    # The first look finds everything new, which tells nothing of what comes after it.
    told = np.where(rows["news"] == NEWS_UNKNOWN, changed, average)
    for name, value in (
        ("interval", interval),
        ("sample", now + interval.astype(np.float64)),
        ("changed", (changed > 0) | new),
        ("news", np.where(new, NEWS_UNKNOWN, told)),
        ("sampled", now),
        ("hinted", 0),
    ):
        np.copyto(rows[name], value, where=sampled, casting="unsafe")


def after_hint(rows: Array, now: float, settle: float, breaks: bool) -> bool:
    """Take samples of one region when it has been quiet for `settle`, twice that if it `breaks`.

    Returns whether it was moved: it is MAX_HINTS times at most, so that it cannot be put off for
    ever.
    """
    if rows["hinted"][0] >= MAX_HINTS:
        return False
    rows["hinted"] += 1
    rows["sample"] = now + settle_of(rows, settle) * (2 if breaks else 1)
    return True


def after_search(rows: Array, now: float, settle: float) -> None:
    """Say when to look at regions again, of which some pages may have got partners."""
    _set_due(rows, np.minimum(now, np.where(rows["due"] > 0, rows["due"], now)), settle)


def after_merge(rows: Array, now: float, settle: float) -> None:
    """Look at a region again soon, as its yield was good: back-off starts over."""
    own = settle_of(rows, settle)
    rows["interval"] = np.maximum(own * REVISIT, _MIN_INTERVAL_SECONDS)
    rows["sample"] = now + rows["interval"].astype(np.float64)
    _set_due(rows, now, settle)


def _set_due(rows: Array, soonest: float | Array, settle: float) -> None:
    """Say when the next look is due: first full checksums at once, which is `soonest`."""
    tick = _tick_seconds(settle)
    rows["sample"] = _gathered(rows["sample"], tick)
    told = np.maximum(rows["read"], rows["sampled"])
    second = np.where(rows["second"] > 0, told + settle_of(rows, settle), _NEVER)
    due = np.minimum(rows["sample"], _gathered(second, tick))
    rows["due"] = np.where(rows["first"] > 0, np.minimum(soonest, due), due)


def _tick_seconds(settle: float) -> float:
    """Return which part of `settle` looks may wait for others; a power of two, or 0."""
    longest = min(MAX_TICK_SECONDS, settle * _TICK_SHARE)
    return 2.0 ** math.floor(math.log2(longest)) if longest >= _LEAST_TICK_SECONDS else 0.0


def _gathered(times: Array, tick: float) -> Array:
    """Return the next tick for each time. As it is a power of two, doing so again changes nothing.

    A look costs some milliseconds more of its own, and nearly nothing for each region.
    """
    return np.ceil(times / tick) * tick if tick else times
