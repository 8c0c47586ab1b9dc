# SPDX-License-Identifier: MIT
"""Agent memory per page scanned, at its peak, while a domain is scanned twice and searched.

    python -m tests.bench.index_memory [PAGES] [REGION_PAGES_USED]

Everything that Python and numpy allocate is counted (tracemalloc), from before the first look to
after the last nomination; no kernel module is needed. The promise is 10 bytes a page (index.py).
Pages come in 4 processes; 30 % of them have duplicates, in groups of about 4.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from dataclasses import dataclass

import numpy as np

from mergemem_agent.contract import RECORD, State
from mergemem_agent.index import nominate
from mergemem_agent.region import REGION_PAGES, Regions
from mergemem_agent.window import Stretch, Window

PROCESSES = 4
REGIONS_PER_LOOK = 8
_WARM_UP_PAGES = 20_000


@dataclass(frozen=True)
class Measurement:
    """What one run took."""

    pages: int
    peak_bytes: int
    kept_bytes: int
    nominated: int
    look_seconds: float
    index_seconds: float

    @property
    def peak_bytes_per_page(self) -> float:
        """The figure that is promised to be 10 at most."""
        return self.peak_bytes / self.pages


def measure(pages: int, used: int = REGION_PAGES, duplicates: float = 0.3) -> Measurement:
    """Scan `pages` pages twice, `used` of them in each region, search them once."""
    regions_each = max(REGIONS_PER_LOOK, pages // PROCESSES // used)
    total = regions_each * used * PROCESSES
    distinct = max(1, int(total * duplicates / 4))
    if pages > _WARM_UP_PAGES:
        measure(_WARM_UP_PAGES)  # numpy imports some of itself when first used: a megabyte of code
    tracemalloc.start()
    try:
        processes = [Regions() for _ in range(PROCESSES)]
        started = time.process_time()
        for index, regions in enumerate(processes):
            regions.replace(np.arange(regions_each, dtype=np.uint64) + np.uint64(1000))
            for now in (100.0, 110.0):
                _look(regions, index, now, used, duplicates, distinct)
        looked = time.process_time()
        kept, _ = tracemalloc.get_traced_memory()
        nominated = sum(len(array) for array in nominate(processes))
        searched = time.process_time()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return Measurement(total, peak, kept, nominated, looked - started, searched - looked)


def _look(
    regions: Regions, seed: int, now: float, used: int, duplicates: float, distinct: int
) -> None:
    random = np.random.default_rng(seed)
    for first in range(0, len(regions.rows), REGIONS_PER_LOOK):
        count = min(REGIONS_PER_LOOK, len(regions.rows) - first)
        records = np.zeros((count, REGION_PAGES), dtype=RECORD)
        chosen = records[:, :used]
        unique = random.integers(2**63, size=chosen.shape, dtype=np.uint64)
        shared = random.integers(distinct, size=chosen.shape, dtype=np.uint64)
        # Well mixed, as checksums are: the multiplier of Fibonacci hashing.
        shared = (shared + np.uint64(1)) * np.uint64(0x9E37_79B9_7F4A_7C15)
        is_shared = random.random(chosen.shape) < duplicates
        chosen["checksum"] = np.where(is_shared, shared, unique * np.uint64(2))
        chosen["state"] = State.ANON
        chosen["map_count"] = 1
        Window([Stretch(regions, first, count)]).look(records.ravel(), now, 10.0, 1 << 20)


def main() -> int:
    """Measure and print; exit status 1 when the promise is broken."""
    arguments = [int(argument) for argument in sys.argv[1:]]
    pages = arguments[0] if arguments else 2_000_000
    result = measure(pages, arguments[1] if len(arguments) > 1 else REGION_PAGES)
    print(f"{result.pages} pages, {result.nominated} nominated")
    print(f"kept between two looks  {result.kept_bytes / result.pages:6.2f} bytes a page")
    print(f"peak while searching    {result.peak_bytes_per_page:6.2f} bytes a page")
    print(
        f"two looks, without checksums  {result.look_seconds / result.pages * 1e9:6.0f} ns a page"
    )
    print(
        f"one search                    {result.index_seconds / result.pages * 1e9:6.0f} ns a page"
    )
    return 0 if result.peak_bytes_per_page <= 10 else 1


if __name__ == "__main__":
    sys.exit(main())
