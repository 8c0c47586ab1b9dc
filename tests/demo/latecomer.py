# SPDX-License-Identifier: MIT
"""A process that comes late, writes memory that its sibling has as well, and then keeps quiet.

    python -m tests.demo.latecomer

Prints the monotonic clock's seconds right after its last write; ends when its input does. Start two
with Latecomers, and see how long it takes until they share.
"""

from __future__ import annotations

import mmap
import subprocess
import sys
import time
from types import TracebackType

from tests.demo import catalogue, fleet, frames

PAGES = 2048


def main() -> int:
    """Write, tell, wait."""
    with mmap.mmap(
        -1, PAGES * catalogue.PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    ) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for number in range(PAGES):
            memory.write(catalogue.page("latecomer", number))
        print(time.monotonic(), flush=True)
        sys.stdin.read()
    return 0


class Latecomers:
    """Two of them, as the fleet's user."""

    def __init__(self) -> None:
        words = ["setpriv", f"--reuid={fleet.USER_ID}", f"--regid={fleet.USER_ID}"]
        words += ["--clear-groups", "--", fleet.python(), "-m", "tests.demo.latecomer"]
        self._processes = [
            subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=fleet.BOUND_CHECKOUT
            )
            for _ in range(2)
        ]

    def __enter__(self) -> Latecomers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.communicate()

    def last_write_seconds(self) -> float:
        """When the slower one had written all."""
        lines = [process.stdout.readline() for process in self._processes if process.stdout]
        return max(map(float, lines))

    def merged_pages(self) -> int:
        """How many pages of each are merged now, of PAGES and those of Python itself."""
        return frames.count(process.pid for process in self._processes).merged_mappings // 2


if __name__ == "__main__":
    sys.exit(main())
