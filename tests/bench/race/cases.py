# SPDX-License-Identifier: MIT
"""The eight cases: what runs in each, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass

PAGES_PER_MIB = 256
# Of the KSM settings' names and of mergemem's.
NOBODY = "nobody"
MERGEMEM, MERGEMEM_HELD = "mergemem", "mergemem, held"
DEFAULTS, ADVISOR, FLAT_OUT = "ksmd defaults", "ksmd advisor", "ksmd flat out"
KSMD_HELD = "ksmd flat out, held"
# In percent of a core: the budget of those that are held.
HELD_PERCENT = 20
# These have all the rounds; the others, which take long, one.
MAIN = (MERGEMEM, FLAT_OUT)
SLOW = (DEFAULTS, ADVISOR)
HELD = (MERGEMEM_HELD, KSMD_HELD)
CONTESTANTS = (*MAIN, *SLOW, *HELD)
ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """One case. Times are seconds from the moment when the last process has filled its memory."""

    number: int
    name: str
    title: str
    contestants: tuple[str, ...] = CONTESTANTS
    # What workload.c knows; "" for the fleet of Python.
    kind: str = "same"
    processes: int = 4
    mib_each: int = 24
    # Between the starts of two processes; 0: all at once.
    grow_seconds: float = 0.0
    # For so long every run goes on; then until most of the census has come back, or to the limit.
    window_seconds: float = 15.0
    limit_seconds: float = 60.0
    slow_limit_seconds: float = 20.0
    window_only: bool = False
    # Then it goes on for so long, to see what being idle costs.
    idle_seconds: float = 0.0
    server: bool = False
    # Flushes are counted in a run of its own; see race.py.
    counts_flushes: bool = True
    rounds: int = ROUNDS
    products: int = 0

    @property
    def pages_each(self) -> int:
        return self.mib_each * PAGES_PER_MIB


CASES = (
    Case(
        1,
        "prefork",
        "a prefork fleet of Python, after requests",
        kind="",
        products=20_000,
        # It matters a lot what the workers write to while they are looked at.
        rounds=5,
    ),
    Case(2, "weights", "workers that loaded the same weights"),
    Case(3, "unique", "mostly unique memory, 5 % duplicates", kind="few"),
    Case(4, "duplicates", "all duplicates", kind="groups"),
    Case(
        5,
        "churn",
        "a quarter of the memory is rewritten all the time",
        contestants=(*MAIN, *SLOW),
        kind="churn",
        window_seconds=75,
        window_only=True,
        counts_flushes=False,
        rounds=1,
    ),
    Case(
        6,
        "growing",
        "a fleet that grows: a new worker every 2.5 s",
        processes=6,
        mib_each=16,
        grow_seconds=2.5,
        counts_flushes=False,
    ),
    Case(
        7,
        "idle",
        "idle after everything has merged",
        contestants=(*MAIN, *SLOW),
        idle_seconds=30,
        counts_flushes=False,
    ),
    Case(
        8,
        "server",
        "a Redis server beside each scanner",
        contestants=(NOBODY, *MAIN, *SLOW, *HELD),
        kind="churn",
        processes=3,
        mib_each=16,
        window_seconds=25,
        window_only=True,
        server=True,
        counts_flushes=False,
        rounds=1,
    ),
)


def select(names: str) -> tuple[Case, ...]:
    """Cases by name or number, separated by blanks; all of them for none."""
    wanted = names.split()
    known = {word for case in CASES for word in (case.name, str(case.number))}
    if unknown := [word for word in wanted if word not in known]:
        told = ", ".join(case.name for case in CASES)
        raise ValueError(f"CASE: there is no case {unknown[0]!r}; the cases are {told}")
    return tuple(
        case for case in CASES if not wanted or {case.name, str(case.number)} & set(wanted)
    )
