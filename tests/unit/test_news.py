# SPDX-License-Identifier: MIT
"""When a pool has enough news to be searched, and what becomes of the news then."""

from __future__ import annotations

import numpy as np
import pytest

from mergemem_agent import news
from mergemem_agent.news import ALL_SECONDS, CHEAP_INDEX_PAGES, INDEX_SECONDS, News
from mergemem_agent.policy import Policy, Selector
from mergemem_agent.targets import Pool

RULES = Policy(name="news", select=Selector()).rules
POOL, OTHER = Pool("one", RULES), Pool("other", RULES)
MANY = 100 * CHEAP_INDEX_PAGES


class Clock:
    """Stands for the module time."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    chosen = Clock()
    monkeypatch.setattr(news, "time", chosen)
    return chosen


def searches(
    found: News, pages: int, due: bool = True, rest: float = 0.0
) -> list[tuple[Pool, bool]]:
    return found.searches({POOL: pages}, lambda _: due, lambda *_: rest)


@pytest.mark.parametrize(("fresh", "enough"), [(MANY // 8 - 1, False), (MANY // 8, True)])
def test_an_eighth_is_enough(clock: Clock, fresh: int, enough: bool) -> None:
    del clock
    found = News()
    found.add(POOL, samples=fresh)
    assert searches(found, MANY) == ([(POOL, True)] if enough else [])
    found = News()
    found.add(POOL, deep=fresh)
    assert searches(found, MANY) == ([(POOL, False)] if enough else [])


def test_little_waits_but_not_for_ever(clock: Clock) -> None:
    found = News()
    found.add(POOL, deep=1)
    clock.now += INDEX_SECONDS - 1
    found.add(POOL, deep=1)
    assert not searches(found, MANY)
    clock.now += 1
    assert searches(found, MANY) == [(POOL, False)]


def test_a_cheap_search_waits_until_nothing_is_due(clock: Clock) -> None:
    del clock
    found = News()
    found.add(POOL, samples=1)
    assert not searches(found, CHEAP_INDEX_PAGES, due=True)
    assert searches(found, CHEAP_INDEX_PAGES, due=False) == [(POOL, True)]
    assert not searches(found, CHEAP_INDEX_PAGES + 257, due=False)


def test_what_promises_too_little_waits_for_more_or_for_longer(clock: Clock) -> None:
    found = News()
    found.add(POOL, samples=1)
    assert not searches(found, CHEAP_INDEX_PAGES, due=False, rest=100.0)
    clock.now += INDEX_SECONDS + 1
    assert not searches(found, CHEAP_INDEX_PAGES, due=False, rest=100.0)
    assert searches(found, CHEAP_INDEX_PAGES, due=False, rest=0.0)
    assert searches(found, 8, rest=100.0), "an eighth is enough"
    clock.now += 100.0
    assert searches(found, CHEAP_INDEX_PAGES, rest=100.0) == [(POOL, True)]


def test_pools_that_are_gone_are_forgotten() -> None:
    found = News()
    found.add(POOL, samples=MANY)
    found.add(OTHER, samples=MANY)
    assert searches(found, 8) == [(POOL, True)]
    assert len(found) == 1


@pytest.mark.parametrize(("samples", "left"), [(True, []), (False, [(POOL, True)])])
def test_a_search_uses_up_what_it_was_about(
    clock: Clock, samples: bool, left: list[tuple[Pool, bool]]
) -> None:
    found = News()
    found.add(POOL, samples=MANY, deep=MANY)
    clock.now += 2 * INDEX_SECONDS
    with found.taken(POOL, samples):
        assert not searches(found, MANY)
    assert searches(found, MANY) == left
    # And the wait begins anew.
    found.add(POOL, deep=1)
    assert (POOL, False) not in searches(found, MANY)


def test_a_search_that_ends_early_uses_up_nothing(clock: Clock) -> None:
    del clock
    found = News()
    found.add(POOL, samples=MANY // 8 - 1)

    def search() -> None:
        with found.taken(POOL, samples=True):
            found.add(POOL, samples=1)  # which came meanwhile
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search()
    assert searches(found, MANY) == [(POOL, True)]


SOME = np.array([7, 9], dtype=np.uint16)


def heads_taken(found: News, samples: bool = True) -> list[int] | None:
    with found.taken(POOL, samples) as heads:
        return None if heads is None else np.flatnonzero(heads).tolist()


def test_a_search_is_about_what_is_new(clock: Clock) -> None:
    found = News()
    found.add(POOL, samples=1, heads=SOME)
    assert heads_taken(found) is None, "the first is about everything"
    found.add(POOL, samples=2, heads=SOME)
    found.add(POOL, deep=2, heads=SOME + 1)
    assert heads_taken(found) == [7, 8, 9, 10]
    found.add(POOL, deep=1, heads=SOME)
    assert heads_taken(found) == [7, 9]
    clock.now += ALL_SECONDS
    found.add(POOL, samples=1, heads=SOME)
    assert heads_taken(found) is None, "what was left out is not for ever"
    found.add(POOL, samples=1, heads=SOME)
    found.add(POOL, deep=1)
    assert heads_taken(found) is None, "nobody knows what is new"


def test_a_search_among_what_was_read_in_full_leaves_samples_new(clock: Clock) -> None:
    del clock
    found = News()
    found.add(POOL, samples=1)
    heads_taken(found)
    found.add(POOL, samples=1, heads=SOME)
    found.add(POOL, deep=1, heads=SOME + 1)
    assert heads_taken(found, samples=False) == [7, 8, 9, 10]
    found.add(POOL, deep=1, heads=SOME + 2)
    assert heads_taken(found) == [7, 8, 9, 10, 11]
    assert heads_taken(found) == []


def test_a_search_that_ends_early_leaves_its_heads(clock: Clock) -> None:
    del clock
    found = News()
    found.add(POOL, samples=1)
    heads_taken(found)
    found.add(POOL, samples=1, heads=SOME)

    def search() -> None:
        with found.taken(POOL, samples=True):
            found.add(POOL, samples=1, heads=SOME + 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search()
    assert heads_taken(found) == [7, 9, 11]


def test_after_a_search_for_what_is_new_one_for_everything_is_owed(clock: Clock) -> None:
    found = News()
    found.add(POOL, samples=1)
    heads_taken(found)
    clock.now += ALL_SECONDS
    assert not searches(found, MANY), "that was everything"
    found.add(POOL, deep=1, heads=SOME)
    heads_taken(found)  # everything again: its time has come
    found.add(POOL, deep=1, heads=SOME)
    assert heads_taken(found) == [7, 9]
    clock.now += ALL_SECONDS - 1
    assert not searches(found, MANY)
    clock.now += 1
    assert not searches(found, MANY, rest=2 * ALL_SECONDS), "it has to be cheap enough"
    assert searches(found, MANY) == [(POOL, True)]
    assert heads_taken(found) is None
    clock.now += 2 * ALL_SECONDS
    assert not searches(found, MANY), "once"


def test_what_was_not_carried_out_is_searched_again(clock: Clock) -> None:
    found = News()
    found.add(POOL, samples=1)
    with found.taken(POOL, samples=True):
        found.owe(POOL)
    assert not searches(found, MANY)
    clock.now += ALL_SECONDS
    assert searches(found, MANY) == [(POOL, True)]


def test_a_search_among_what_was_read_in_full_is_not_about_everything(clock: Clock) -> None:
    del clock
    found = News()
    found.owe(POOL)
    found.add(POOL, deep=1)
    assert heads_taken(found, samples=False) is None
    found.add(POOL, deep=1, heads=SOME)
    assert heads_taken(found, samples=False) == [7, 9], "it was about all of these"
    found.add(POOL, samples=1, heads=SOME)
    assert heads_taken(found) is None


def test_what_is_never_carried_out_is_searched_ever_more_rarely(clock: Clock) -> None:
    found = News()
    found.add(POOL, samples=1)
    waits = []
    for _ in range(7):
        with found.taken(POOL, samples=True):
            found.owe(POOL)
        begun = clock.now
        while not searches(found, MANY):
            clock.now += 1
        waits.append((clock.now - begun) / ALL_SECONDS)
    assert waits == [1, 2, 4, 8, 16, 30, 30]
    heads_taken(found)
    heads_taken(found)
    found.owe(POOL)
    clock.now += ALL_SECONDS
    assert searches(found, MANY) == [(POOL, True)]


def test_a_pool_of_huge_pages_is_searched_for_everything(clock: Clock) -> None:
    found = News()
    found.add(POOL, samples=1)
    heads_taken(found)
    found.add(POOL, samples=1, heads=SOME)
    with found.taken(POOL, samples=True, everything=True) as heads:
        assert heads is None
    clock.now += 2 * ALL_SECONDS
    assert not searches(found, MANY), "none is owed"
