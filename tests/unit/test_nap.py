# SPDX-License-Identifier: MIT
"""How long the agent sleeps when there is nothing to do."""

from mergemem_agent.nap import IDLE_MAX_SECONDS, IDLE_SECONDS, Naps

POLL_SECONDS = 0.25


def test_naps_get_longer_while_nothing_comes() -> None:
    naps = Naps(POLL_SECONDS)
    found = [naps.next(stirred=False, followed_seconds_ago=0.0) for _ in range(4)]
    assert found == [(IDLE_SECONDS, True), (4.0, True), (IDLE_MAX_SECONDS, True), (5.0, True)]


def test_events_are_looked_for_no_more_often_than_it_is_worth() -> None:
    naps = Naps(POLL_SECONDS)
    assert naps.next(stirred=True, followed_seconds_ago=0.1) == (0.15, False)


def test_whoever_waits_to_be_looked_at_is_not_slept_over() -> None:
    """Events that a round has taken in may be older than it is worth to wait for the next."""
    naps = Naps(POLL_SECONDS)
    assert naps.next(stirred=True, followed_seconds_ago=1.5) == (0.0, False)


def test_the_next_nap_after_a_stir_is_a_short_one() -> None:
    naps = Naps(POLL_SECONDS)
    for _ in range(3):
        naps.next(stirred=False, followed_seconds_ago=0.0)
    naps.next(stirred=True, followed_seconds_ago=0.0)
    assert naps.next(stirred=False, followed_seconds_ago=0.0) == (IDLE_SECONDS, True)
