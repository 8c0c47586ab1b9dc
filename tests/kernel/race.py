# SPDX-License-Identifier: MIT
"""Races that must have been met, or the test was none; how fast the host is must not matter."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

# Far more than any race here takes until everything has happened, in a slow guest on a busy host.
PATIENCE_SECONDS = 600


def rounds(
    seconds: float, met: Callable[[], bool], told: Callable[[], object] = lambda: ""
) -> Iterator[int]:
    """Round after round, for so long at least, and then until all that must happen has happened.

    A failed assertion, with what is told, if it never does.
    """
    began = time.monotonic()
    number = 0
    while True:
        passed_seconds = time.monotonic() - began
        if passed_seconds >= seconds and met():
            return
        late = passed_seconds > seconds + PATIENCE_SECONDS
        assert not late, f"not all was met in {number} rounds: {told()}"
        yield number
        number += 1
