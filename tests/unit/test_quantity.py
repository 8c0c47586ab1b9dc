# SPDX-License-Identifier: MIT
"""Quantities: what is read, what is refused, and that text and number agree."""

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergemem_agent import quantity
from mergemem_agent.policy_schema import schema
from mergemem_agent.quantity import (
    QuantityError,
    format_duration,
    format_percent,
    format_size,
    parse_duration,
    parse_percent,
    parse_size,
)

PARSERS: dict[str, Callable[[str], float]] = {
    "duration": parse_duration,
    "percent": parse_percent,
    "size": parse_size,
}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10s", 10), ("500ms", 0.5), ("1.5h", 5400), ("2m", 120), ("1d", 86400), ("0s", 0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("64MiB", 67108864), ("0.5KiB", 512), ("7B", 7), ("1TiB", 1 << 40), ("0.3B", 0)],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


def test_percent() -> None:
    assert parse_percent("2.5%") == 2.5


@pytest.mark.parametrize(
    ("parse", "text", "suggestion"),
    [
        (parse_duration, "10", "10s"),
        (parse_duration, "10sec", "10s"),
        (parse_duration, "10 s", "10s"),
        (parse_duration, "1M", "1m"),
        (parse_duration, "1KiB", ""),
        (parse_size, "64MB", "64MiB"),
        (parse_size, "64M", "64MiB"),
        (parse_size, "64", "64MiB"),
        (parse_percent, "5", "5%"),
        (parse_percent, "5percent", "5%"),
        (parse_percent, "5s", ""),
        (parse_duration, "-5s", ""),
        (parse_duration, "ten", ""),
        (parse_duration, "", ""),
        (parse_duration, "1e3s", ""),
        (parse_duration, ".5s", ""),
        (parse_duration, "\u0661s", ""),
        (parse_duration, "10s\n", "10s"),
        (parse_size, "9" * 16 + "TiB", ""),
    ],
)
def test_refused_with_suggestion(parse: Callable[[str], float], text: str, suggestion: str) -> None:
    with pytest.raises(QuantityError) as caught:
        parse(text)
    assert caught.value.suggestion == suggestion
    if suggestion:
        parse(suggestion)


@given(st.sampled_from(sorted(PARSERS)), st.text("0123456789.%smhdKMGTiB eE-+", max_size=8))
def test_the_schema_accepts_what_the_parser_accepts(kind: str, text: str) -> None:
    """Two witnesses of one grammar: the regular expression for editors, and the parser."""
    pattern = schema()["$defs"][kind]["pattern"]
    try:
        PARSERS[kind](text)
        parsed = True
    except QuantityError:
        parsed = False
    assert parsed == bool(re.search(pattern, text))


@given(
    st.integers(0, 10**6),
    st.integers(0, 999),
    st.sampled_from(
        [(u, n) for n in ("DURATION", "SIZE") for u in getattr(quantity, n + "_UNITS")]
    ),
)
def test_value_is_number_times_unit(whole: int, thousandths: int, unit: tuple[str, str]) -> None:
    name, table = unit
    factor = float(getattr(quantity, table + "_UNITS")[name])
    parse = parse_duration if table == "DURATION" else parse_size
    value = parse(f"{whole}.{thousandths:03}{name}")
    exact = (whole + thousandths / 1000) * factor
    assert value == pytest.approx(exact, rel=1e-9, abs=1)


@given(st.floats(0.001, 1e9))
def test_formatted_duration_is_close_and_readable(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, rel=0.06)


@given(st.integers(1, 1 << 50))
def test_formatted_size_is_close_and_readable(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == pytest.approx(size_bytes, rel=0.06)


def test_formats() -> None:
    assert format_duration(0) == "0s"
    assert format_duration(90) == "1.5m"
    assert format_duration(0.0004) == "0.4ms"
    assert format_size(0) == "0B"
    assert format_size(1023) == "1023B"
    assert format_size(64 << 20) == "64MiB"
    assert format_percent(5.0) == "5%"
    assert format_percent(0.5) == "0.5%"
