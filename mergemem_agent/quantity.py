# SPDX-License-Identifier: MIT
"""Quantities with their units, as people write them: ``10s``, ``5%``, ``64MiB``.

A number without a unit is refused everywhere, and so are units that mean two things: a file that
says ``64M`` would leave it to the reader's memory whether that is 64,000,000 or 67,108,864.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType

DURATION_UNITS: Mapping[str, Fraction] = MappingProxyType(
    {
        "ms": Fraction(1, 1000),
        "s": Fraction(1),
        "m": Fraction(60),
        "h": Fraction(3600),
        "d": Fraction(86400),
    }
)
SIZE_UNITS: Mapping[str, Fraction] = MappingProxyType(
    {"B": Fraction(1)}
    | {unit: Fraction(1024**power) for power, unit in enumerate(("KiB", "MiB", "GiB", "TiB"), 1)}
)
PERCENT_UNITS: Mapping[str, Fraction] = MappingProxyType({"%": Fraction(1)})

# ASCII digits only: \d would take those of all scripts, and the schema's regular expression not.
_QUANTITY = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(\S*)\s*", re.ASCII)

# What people write instead, by lower case.
_MISTAKES = {
    "b": "B", "byte": "B", "bytes": "B",
    "k": "KiB", "kb": "KiB", "kib": "KiB",
    "m": "MiB", "mb": "MiB", "mib": "MiB",
    "g": "GiB", "gb": "GiB", "gib": "GiB",
    "t": "TiB", "tb": "TiB", "tib": "TiB",
    "msec": "ms", "millisecond": "ms", "milliseconds": "ms",
    "sec": "s", "second": "s", "seconds": "s",
    "min": "m", "minute": "m", "minutes": "m",
    "hour": "h", "hours": "h", "hr": "h",
    "day": "d", "days": "d",
    "percent": "%", "pct": "%",
}  # fmt: skip


class QuantityError(ValueError):
    """The text is no such quantity. `suggestion` is what may have been meant, or empty."""

    def __init__(self, message: str, suggestion: str = "") -> None:
        """Keep the suggestion apart from the message."""
        super().__init__(message)
        self.suggestion = suggestion


def parse_duration(text: str) -> float:
    """Return seconds: ``"1.5h"`` is 5400.0. Raises QuantityError."""
    return float(_parse(text, DURATION_UNITS, "s"))


def parse_size(text: str) -> int:
    """Return bytes, cut to whole ones: ``"64MiB"`` is 67108864. Raises QuantityError."""
    return int(_parse(text, SIZE_UNITS, "MiB"))


def parse_percent(text: str) -> float:
    """Return percent: ``"2.5%"`` is 2.5. Raises QuantityError."""
    return float(_parse(text, PERCENT_UNITS, "%"))


def format_duration(seconds: float) -> str:
    """Return a duration for people, in the largest unit that fits it, rounded to a tenth."""
    return _format(seconds, DURATION_UNITS, "s")


def format_size(size_bytes: float) -> str:
    """Return a size for people, in the largest unit that fits it, rounded to a tenth."""
    return _format(size_bytes, SIZE_UNITS, "B")


def format_percent(percent: float) -> str:
    """Return a percentage for people, without zeros at its end."""
    return f"{percent:g}%"


def _parse(text: str, units: Mapping[str, Fraction], usual_unit: str) -> Fraction:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise QuantityError(f"{text!r} is not a number and a unit")
    number, unit = match.groups()
    if number + unit != text:
        raise QuantityError(f"{text!r} has a blank in it", number + unit)
    if not unit:
        raise QuantityError(f"{text!r} has no unit", number + usual_unit)
    if unit not in units:
        meant = unit.lower() if unit.lower() in units else _MISTAKES.get(unit.lower(), "")
        raise QuantityError(
            f"{text!r} has the unknown unit {unit!r}", number + meant if meant in units else ""
        )
    return Fraction(number) * units[unit]


def _format(value: float, units: Mapping[str, Fraction], zero_unit: str) -> str:
    if value == 0:
        return f"0{zero_unit}"
    for unit, factor in sorted(units.items(), key=lambda item: -item[1]):
        if value >= factor:
            return f"{round(value / float(factor), 1):.12g}{unit}"
    smallest = next(iter(units))
    return f"{value / float(units[smallest]):.1g}{smallest}"
