# SPDX-License-Identifier: MIT
"""All judges."""

from __future__ import annotations

from collections.abc import Sequence

from tests.judges import cpython, postgres, redis, sqlite, stress
from tests.judges.judge import Judge

JUDGES: tuple[Judge, ...] = (
    *stress.JUDGES,
    *sqlite.JUDGES,
    *postgres.JUDGES,
    *redis.JUDGES,
    *cpython.JUDGES,
)


def chosen(names: Sequence[str]) -> list[Judge]:
    """Judges by name, or by the beginning of names; all if none is given."""
    if not names:
        return list(JUDGES)
    wanted = {judge.name for name in names for judge in _called(name)}
    return [judge for judge in JUDGES if judge.name in wanted]


def _called(name: str) -> list[Judge]:
    exact = [judge for judge in JUDGES if judge.name == name]
    found = exact or [judge for judge in JUDGES if judge.name.startswith(name)]
    if not found:
        known = ", ".join(judge.name for judge in JUDGES)
        raise LookupError(f"there is no judge {name}; there are: {known}")
    return found
