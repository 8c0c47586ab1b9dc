# SPDX-License-Identifier: MIT
"""How long the agent sleeps when there is nothing to do."""

from mergemem_agent.nap import IDLE_MAX_SECONDS, IDLE_SECONDS, QUIET_SECONDS, Nap, Naps

POLL_SECONDS = 0.25


def naps_of(seconds: float) -> list[Nap]:
    """The naps of so long a time in which nothing comes."""
    naps, now, found = Naps(POLL_SECONDS, 1000.0), 1000.0, []
    while now < 1000.0 + seconds:
        found.append(naps.next(now, stirred=False, followed_seconds_ago=0.0))
        now += found[-1].seconds
    return found


def test_naps_get_longer_while_nothing_comes() -> None:
    found = [nap.seconds for nap in naps_of(70)]
    assert found == [IDLE_SECONDS, 2.0, 4.0, 8.0, 16.0, IDLE_MAX_SECONDS, IDLE_MAX_SECONDS]


def test_hints_wake_whoever_has_long_had_none() -> None:
    """Else the first one after each drain would, where memory is written to all the time."""
    assert [nap.for_hints for nap in naps_of(20)] == [False, False, False, True, True]
    naps = Naps(POLL_SECONDS, 1000.0)
    naps.stir(1010.0)
    before = naps.next(1010.0 + QUIET_SECONDS - 1, stirred=False, followed_seconds_ago=0.0)
    after = naps.next(1010.0 + QUIET_SECONDS, stirred=False, followed_seconds_ago=0.0)
    assert (before.for_hints, after.for_hints) == (False, True)


def test_events_are_looked_for_no_more_often_than_it_is_worth() -> None:
    naps = Naps(POLL_SECONDS, 1000.0)
    nap = naps.next(1000.0, stirred=True, followed_seconds_ago=0.1)
    assert nap == Nap(0.15, for_events=False, for_hints=False)


def test_whoever_waits_to_be_looked_at_is_not_slept_over() -> None:
    """Events that a round has taken in may be older than it is worth to wait for the next."""
    naps = Naps(POLL_SECONDS, 1000.0)
    nap = naps.next(1000.0, stirred=True, followed_seconds_ago=1.5)
    assert nap == Nap(0.0, for_events=False, for_hints=False)


def test_the_next_nap_after_a_stir_is_a_short_one() -> None:
    naps = Naps(POLL_SECONDS, 1000.0)
    naps.next(1500.0, stirred=True, followed_seconds_ago=0.0)
    nap = naps.next(1500.0, stirred=False, followed_seconds_ago=0.0)
    assert nap == Nap(IDLE_SECONDS, for_events=True, for_hints=False)
