# SPDX-License-Identifier: MIT
"""Merging under the feet of random writers while something else moves their memory about.

two actors, random writers in each     what each word must be is kept in a shadow
  ├── merged again and again            by the test
  └── disturbed again and again         by a thread: compaction, collapse, migration, ...
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from threading import Event, Thread

from tests.kernel import race
from tests.kernel.actor import Region
from tests.kernel.contract import Result
from tests.kernel.sharing import unless_busy
from tests.kernel.wire import Client
from tests.kernel.writers import Writers, merge_equal

# Or it was no test.
LEAST_MERGED = 100


def merge_disturbed(
    client: Client,
    regions: Sequence[Region],
    disturb: Callable[[], object],
    seconds: float,
    met: Callable[[], bool] = lambda: True,
) -> tuple[Counter[Result], int]:
    """Start the writers, merge and disturb for a while; all bytes were right all the time.

    Goes on until enough was merged, and all was met that the disturbance is for. Returns what
    became of the candidates, and how often it was disturbed.
    """
    writers = Writers(regions)
    stop, rounds = Event(), 0
    failures: list[BaseException] = []
    results: Counter[Result] = Counter()

    def disturb_on() -> None:
        nonlocal rounds
        try:
            while not stop.is_set():
                disturb()
                rounds += 1
        except BaseException as failure:
            failures.append(failure)

    def enough() -> bool:
        merged = results[Result.SUCCESS] > LEAST_MERGED
        return bool(failures) or (rounds > 0 and merged and met())

    thread = Thread(target=disturb_on)
    thread.start()
    try:
        for _ in race.rounds(seconds, enough, lambda: (rounds, results)):
            with unless_busy():
                results.update(merge_equal(client, regions))
    finally:
        stop.set()
        thread.join()
    assert not failures, failures
    writers.stop()
    print(f"disturbed {rounds} times; {dict(results)}")
    return results, rounds
