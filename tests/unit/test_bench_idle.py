# SPDX-License-Identifier: MIT
"""What make bench-idle makes of the moments that the guest wrote down."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bench import idle

PAGES = 1000


def moment(minute: int, cpu_seconds: float) -> dict[str, Any]:
    """All of the CPU time is that of the scan, but for a tenth, which is another thread's."""
    return {
        "at": 100.0 + 60 * minute,
        "cpu_ns": int(cpu_seconds * 1e9),
        "threads": {
            "main": {"ns": int(cpu_seconds * 9e8), "sleeps": 10 * minute},
            "others": {"ns": int(cpu_seconds * 1e8), "sleeps": 300 * minute},
        },
        "stages": {"scan": cpu_seconds * 0.9} if minute else {},
        "rounds": minute,
        "pages": dict.fromkeys(("scanned", "sampled", "checksummed"), PAGES * minute),
    }


@pytest.fixture
def facts() -> dict[str, Any]:
    return {
        "pages": PAGES,
        "fill_seconds": 20.0,
        "done": {"seconds": 30.0, "memory": {"remembered_pages": PAGES, "merged_pages": 50}},
        "start": {"memory_before": {"Rss": 64_000}},
        "memory": {"Rss": 72_000},
        "scrape_seconds": 0.05,
        "moments": [moment(minute, at) for minute, at in enumerate((0.0, 6.0, 6.3, 6.6, 6.72))],
    }


def test_percentages_of_a_core(facts: dict[str, Any]) -> None:
    found = idle.figures(facts)
    percents = [minute["percent"] for minute in found["minutes"]]
    assert percents == pytest.approx([10.0, 0.5, 0.5, 0.2])
    assert found["whole"]["percent"] == pytest.approx(2.8)
    assert found["later"]["percent"] == pytest.approx(0.35)
    assert found["minutes"][0]["stages_percent"]["scan"] == pytest.approx(9.0)
    assert found["minutes"][0]["other_threads_percent"] == pytest.approx(1.0)
    assert found["minutes"][3]["sleeps"] == {"main": 10, "others": 300}


def test_memory_for_each_page(facts: dict[str, Any]) -> None:
    found = idle.figures(facts)
    assert found["rss_bytes_per_page"] == 72
    assert found["grown_bytes_per_page"] == 8


def test_the_later_half_is_judged(facts: dict[str, Any]) -> None:
    where = {"release": "6.12.0", "accelerator": "tcg", "host_load": 1.0}
    text = idle.markdown({"6.12": where | idle.figures(facts)})
    assert "0.35 % in the later half: reached" in text
    assert "| 1 | 10.000 | 1.000 | 0.000 | 9.000 |" in text
