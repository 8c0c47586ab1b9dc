# SPDX-License-Identifier: MIT
"""The judges' results as Markdown: every kernel, every judge, and whatever was not right."""

from __future__ import annotations

from typing import Any

from tests.judges import table


def judged(name: str, verdict: str = "right", wrong: int = 0) -> dict[str, Any]:
    numbers = {"seconds": 12.4, "merged": 4321, "zeroed": 7, "wrong_results": wrong}
    return {"name": name, "verdict": verdict} | numbers


def report(*judges: dict[str, Any]) -> dict[str, Any]:
    sums = {name: sum(j[name] for j in judges) for name in ("seconds", "merged", "wrong_results")}
    return {"judges": list(judges)} | sums


def test_markdown() -> None:
    reports = {
        "6.1": report(judged("sqlite"), judged("redis", "wrong", 2)),
        "6.12": report(judged("redis")),
    }
    assert table.markdown(reports).splitlines() == [
        "| judge | 6.1: s | merged | zeroed | wrong | 6.12: s | merged | zeroed | wrong |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| sqlite | 12 | 4,321 | 7 | 0 |  |  |  |  |",
        "| redis | 12 | 4,321 | 7 | 2 (**wrong**) | 12 | 4,321 | 7 | 0 |",
        "| **all** | 25 | 8,642 | 14 | 2 | 12 | 4,321 | 7 | 0 |",
    ]
