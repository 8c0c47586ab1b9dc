# SPDX-License-Identifier: MIT
"""`mergemem unmerge`: its words, and whether memory would suffice. The rest is in tests/kernel."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemem_agent import unmerge
from mergemem_agent.headroom import shortages

MIB = 1 << 20


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name processes, or say --all"),
        (["1", "--all"], "name processes, or say --all"),
        (["--all", "--range", "1000-2000"], "for one process"),
        (["1", "2", "--range", "1000-2000"], "for one process"),
        (["1", "--range", "1000"], "no range"),
        (["1", "--range", "xyz-2000"], "no range"),
        (["1", "--range", "2000-1000"], "not ascending"),
        (["1", "--range", "1000-1000"], "not ascending"),
        (["1", "--range", "1001-2000"], "begin and end with a page"),
        (["1", "--range", "1000-ffffffffff600000"], "beyond all memory"),
    ],
)
def test_what_makes_no_sense_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as failure:
        unmerge._parse(words)
    assert failure.value.code == 2
    assert said in capsys.readouterr().err


@settings(deadline=None)
@given(st.integers(0, 2**50), st.integers(1, 2**20), st.booleans(), st.booleans())
def test_ranges_are_read_as_proc_maps_has_them(
    first: int, pages: int, prefixed: bool, upper: bool
) -> None:
    start, end = first * 4096, (first + pages) * 4096
    text = f"{start:#x}-{end:#x}" if prefixed else f"{start:x}-{end:012x}"
    if upper and not prefixed:
        text = text.upper()
    assert unmerge._range(text) == (start, end)


def test_a_range_error_is_one_of_argparse() -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        unmerge._range("")


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """100 MiB available; /shop may take 10 MiB more, /shop/web 4, /shop/db has no limit."""
    (tmp_path / "meminfo").write_text("MemTotal: 1 kB\nMemAvailable:     102400 kB\n")
    for name, limit, current in (
        ("shop", str(30 * MIB), 20 * MIB),
        ("shop/web", str(8 * MIB), 4 * MIB),
        ("shop/db", "max", 4 * MIB),
    ):
        group = tmp_path / "cgroup" / name
        group.mkdir(parents=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{current}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("needs", "missing"),
    [
        ([], []),
        ([("/", 100)], []),
        ([("/", 101)], ["the host"]),
        ([("/gone", 99)], []),
        ([("/shop/web", 4)], []),
        ([("/shop/web", 5)], ["control group /shop/web"]),
        ([("/shop/db", 10)], []),
        ([("/shop/db", 11)], ["control group /shop"]),
        # Each fits alone.
        ([("/shop/db", 8), ("/shop/web", 3)], ["control group /shop"]),
        ([("/shop/web", 3), ("/shop/web", 3)], ["control group /shop/web"]),
        (
            [("/shop/web", 60), ("/", 60)],
            ["the host", "control group /shop", "control group /shop/web"],
        ),
    ],
)
def test_every_limit_counts(host: Path, needs: list[tuple[str, int]], missing: list[str]) -> None:
    in_bytes = [(group, pages * MIB) for group, pages in needs]
    found = shortages(in_bytes, host, host / "cgroup")
    assert [shortage.what for shortage in found] == missing


def test_a_shortage_says_how_much(host: Path) -> None:
    (shortage,) = shortages([("/shop/web", 5 * MIB)], host, host / "cgroup")
    assert str(shortage) == (
        "control group /shop/web has 4MiB left, 5MiB are needed: 1MiB are missing"
    )


def test_a_full_group_has_nothing_left(host: Path) -> None:
    (host / "cgroup/shop/web/memory.current").write_text(f"{9 * MIB}\n")
    (shortage,) = shortages([("/shop/web", 1)], host, host / "cgroup")
    assert shortage.left_bytes == 0
