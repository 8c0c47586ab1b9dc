# SPDX-License-Identifier: MIT
"""The promise of index.py: at most 10 bytes of agent memory per page scanned, at the peak."""

import pytest

from tests.bench.index_memory import measure


@pytest.mark.parametrize("duplicates", [0.0, 0.3, 1.0])
def test_at_most_ten_bytes_a_page(duplicates: float) -> None:
    result = measure(1_000_000, duplicates=duplicates)
    assert result.peak_bytes_per_page <= 10
    # Something was looked for, and found: of all pages that have a duplicate, nearly all.
    assert result.nominated >= duplicates * 0.9 * result.pages
