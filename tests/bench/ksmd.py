# SPDX-License-Identifier: MIT
"""The kernel's own merging thread, one whole pass at a time, and the CPU time that it takes.

With `pages_to_scan` beyond all pages, ksmd makes exactly one pass over everything that opted in
each time it wakes, and a new value of `sleep_millisecs` wakes it. So each pass is measured alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Self

CONTROLS = Path("/sys/kernel/mm/ksm")
STOP, MERGE = "0", "1"
ALL_PAGES = 1 << 30
# It never wakes by itself within a run.
LONG_MILLISECONDS = 100_000_000
PASS_SECONDS = 120
_POLL_SECONDS = 0.01


class Ksmd:
    """ksmd, stopped between passes; as it was at the end."""

    def __init__(self) -> None:
        self.pid = find()
        self._before = {name: get(name) for name in ("run", "pages_to_scan", "sleep_millisecs")}
        self._sleep_milliseconds = LONG_MILLISECONDS

    def __enter__(self) -> Self:
        self.stop()
        put("pages_to_scan", ALL_PAGES)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        for name, value_before in self._before.items():
            put(name, value_before)

    def one_pass(self) -> int:
        """Look at every page that opted in once; CPU nanoseconds."""
        scans, before = get("full_scans"), self._cpu_ns()
        if get("run") == STOP:
            put("run", MERGE)
        else:
            self._wake()
        deadline = time.monotonic() + PASS_SECONDS
        while get("full_scans") == scans or not self._asleep():
            if time.monotonic() > deadline:
                raise TimeoutError(f"ksmd made no whole pass in {PASS_SECONDS} s")
            time.sleep(_POLL_SECONDS)
        return self._cpu_ns() - before

    def stop(self) -> None:
        """No more passes. It goes from its sleep to where setting `run` wakes it."""
        put("run", STOP)
        self._wake()
        time.sleep(_POLL_SECONDS)

    def merged_pages(self) -> int:
        """How many page-table entries map pages that it merged."""
        return int(get("pages_shared")) + int(get("pages_sharing"))

    def _wake(self) -> None:
        self._sleep_milliseconds += 1
        put("sleep_millisecs", self._sleep_milliseconds)

    def _cpu_ns(self) -> int:
        return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0])

    def _asleep(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "SI"


def find() -> int:
    """The process id of ksmd."""
    return next(
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/comm")
        if path.read_text() == "ksmd\n"
    )


def get(name: str) -> str:
    """One of its controls or counters."""
    return (CONTROLS / name).read_text().strip()


def put(name: str, value: object) -> None:
    """Set one of its controls."""
    (CONTROLS / name).write_text(str(value))
