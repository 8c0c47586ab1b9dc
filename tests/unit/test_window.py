# SPDX-License-Identifier: MIT
"""Looking at regions of several processes in one go is looking at each of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemem_agent.batch import look
from mergemem_agent.contract import DEPTH_FULL_BYTES, DEPTH_SAMPLE_BYTES, RECORD, State
from mergemem_agent.look import Wanted
from mergemem_agent.module import AccessDenied, Module, ModuleMissing, NoSuchProcess, Run
from mergemem_agent.order import Slice
from mergemem_agent.policy import Policy, Selector
from mergemem_agent.procfs import ProcessId
from mergemem_agent.region import REGION_PAGES, REGION_SHIFT, Regions
from mergemem_agent.targets import Target
from mergemem_agent.window import DOUBT_SECONDS, Look, Stretch, Window
from mergemem_agent.word import DEEP

Array = np.ndarray[Any, np.dtype[Any]]
SETTLE = 10.0
POLICY = Policy(name="window", select=Selector(), settle_seconds=SETTLE)
# Few, so that pages are often what they were, or look the same by their samples.
CHECKSUMS = np.array([0, 1 << 40, 1 << 40 | 1 << 30, 5 << 40, 5 << 40 | 7 << 28], dtype=np.uint64)


def regions_of(counts: list[int]) -> list[Regions]:
    """Return a table for each process, with so many regions."""
    tables = []
    for count in counts:
        tables.append(Regions())
        tables[-1].replace(np.arange(50, 50 + count, dtype=np.uint64))
    return tables


def any_records(random: np.random.Generator, pages: int) -> Array:
    records = np.zeros(pages, dtype=RECORD)
    for region in np.split(records, pages // REGION_PAGES):
        kinds = random.choice([State.ABSENT, State.ANON, State.MERGED, State.ZERO], 2)
        region["state"] = random.choice(kinds, REGION_PAGES)
    records["checksum"] = random.choice(CHECKSUMS, pages) * (records["state"] != State.ABSENT)
    records["map_count"] = random.choice([1, 2, 300], pages)
    return records


def sums(looks: list[Look]) -> dict[str, int]:
    counts = [name for name in vars(looks[0]) if name != "heads"]
    return {name: sum(vars(one)[name] for one in looks) for name in counts}


def heads(looks: list[Look]) -> set[int]:
    """What all of them are worth a search of, unless that is too much."""
    return {int(head) for one in looks if one.heads is not None for head in one.heads}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.lists(
        st.tuples(st.floats(0.1, 30) | st.just(DOUBT_SECONDS), st.integers(0, 15)),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 1000),
)
def test_it_is_looking_at_each(
    counts: list[int], looks: list[tuple[float, int]], seed: int
) -> None:
    random = np.random.default_rng(seed)
    apart, together = regions_of(counts), regions_of(counts)
    ends = np.cumsum(counts) * REGION_PAGES
    wanted, now = Wanted(zero=True), 0.0
    for seconds, kinds in looks:
        now += seconds
        sampled = [bool(kinds >> index & 1) for index in range(len(counts))]
        records = any_records(random, int(ends[-1]))
        window = Window([Stretch(one, 0, len(one.rows)) for one in together])
        full = window.wanted_in_full(now, SETTLE)
        of_all = np.repeat(sampled, counts)
        seen = window.look(records, now, SETTLE, 200, wanted, full, of_all)
        each = []
        parts = np.split(records, ends[:-1])
        for one, part, its in zip(apart, parts, sampled, strict=True):
            alone = Window([Stretch(one, 0, len(one.rows))])
            mine = alone.wanted_in_full(now, SETTLE)
            each.append(alone.look(part, now, SETTLE, 200, wanted, mine, its))
        assert sums([seen]) == sums(each)
        assert seen.heads is None or heads([seen]) == heads(each)
        for one, other in zip(apart, together, strict=True):
            assert one.rows.tobytes() == other.rows.tobytes()
            assert one.words == other.words
            assert (one.pages, one.next_due) == (other.pages, other.next_due)
        moves = [[one.take_moves() for one in tables] for tables in (apart, together)]
        assert np.sum(moves[0], axis=0).tolist() == np.sum(moves[1], axis=0).tolist()


def test_only_where_samples_are_taken_pages_are_doubted() -> None:
    (table,) = regions_of([2])
    now = 2 * DOUBT_SECONDS
    window = Window([Stretch(table, 0, 2)])
    records = any_records(np.random.default_rng(1), 2 * REGION_PAGES)
    window.look(records, now, SETTLE, 200, sampled=np.array([True, False]))
    assert table.rows["doubted"].tolist() == [now, 0.0]


class Refusing:
    """A module of processes that have one page each, and of which some are refused."""

    def __init__(self, refused: dict[int, Exception]) -> None:
        self.refused = refused

    def checksum(
        self, process: ProcessId, address: int, pages: int, **how: object
    ) -> Iterator[Run]:
        assert (pages, bool(how)) == (REGION_PAGES, True)
        records = np.zeros(1, dtype=RECORD)
        records[0] = (process.pid << 40, 1, State.ANON, 0)
        yield Run(address, records, 0)
        if failure := self.refused.get(process.pid):
            raise failure


def batch_of(pids: list[int]) -> list[Slice]:
    slices = []
    for pid in pids:
        target = Target(ProcessId(pid, 1), POLICY, "domain", 0)
        target.regions.replace(np.array([7], dtype=np.uint64))
        slices.append(Slice(target, 0, 1))
    return slices


@pytest.mark.parametrize("straight", [{2}, set()])
@pytest.mark.parametrize("gone", [[1], [2], [3], [1, 3], [1, 2, 3]])
def test_a_process_that_fails_leaves_the_others_alone(gone: list[int], straight: set[int]) -> None:
    batch = [
        replace(work, straight=work.target.process.pid in straight, sampled=pid != 3)
        for pid, work in enumerate(batch_of([1, 2, 3]), start=1)
    ]
    failures = {pid: NoSuchProcess("gone") if pid < 3 else AccessDenied("no") for pid in gone}
    looked = look(cast(Module, Refusing(dict(failures))), batch, 100)
    assert [(work.target.process.pid, failure) for work, failure in looked.failed] == [
        (pid, failures[pid]) for pid in gone
    ]
    assert [work.target.process.pid for work in looked.done] == sorted({1, 2, 3} - set(gone))
    for work in batch:
        failed = work.target.process.pid in gone
        assert work.target.regions.pages == (0 if failed else 1)
        if not failed:
            word, pid = int(work.target.regions.words_of(0)[0]), work.target.process.pid
            assert word >> 40 == pid
            assert bool(word & DEEP) == (pid in straight)
            assert bool(work.target.regions.rows["sampled"][0]) == (pid != 3)
    assert (looked.seen.scanned if looked.seen else 0) == 3 - len(gone)


def test_a_module_that_is_gone_ends_the_look() -> None:
    with pytest.raises(ModuleMissing):
        look(cast(Module, Refusing({2: ModuleMissing("gone")})), batch_of([1, 2, 3]), 100)


def test_each_slice_is_read_as_it_is_due() -> None:
    """Sampled, straight in full, and only what has a partner: all in one look."""
    batch = [
        replace(work, sampled=sampled, straight=straight)
        for work, sampled, straight in zip(
            batch_of([1, 2, 3]), (True, True, False), (False, True, False), strict=True
        )
    ]
    asked = {}

    class Recording(Refusing):
        def checksum(
            self, process: ProcessId, address: int, pages: int, **how: Any
        ) -> Iterator[Run]:
            asked[process.pid] = (how["depth_bytes"], int(how["full"].sum()))
            yield from super().checksum(process, address, pages, **how)

    looked = look(cast(Module, Recording({})), batch, 100)
    assert asked == {1: (DEPTH_SAMPLE_BYTES, 0), 2: (DEPTH_FULL_BYTES, 0), 3: (0, 0)}
    assert looked.seen
    assert (looked.seen.sampled, looked.seen.checksummed) == (2, 1)
    deep = [int(work.target.regions.words_of(0)[0]) & DEEP != 0 for work in batch]
    assert deep == [False, True, False]
    due = [work.target.regions.rows["sampled"][0] > 0 for work in batch]
    assert due == [True, True, False], "samples are still due where none was taken"


def test_addresses_are_those_of_the_regions() -> None:
    """Records are put where their address says, in whichever process's part."""
    (one, other) = batch_of([1, 2])
    other.target.regions.replace(np.array([9], dtype=np.uint64))
    asked = []

    class Recording(Refusing):
        def checksum(
            self, process: ProcessId, address: int, pages: int, **how: object
        ) -> Iterator[Run]:
            asked.append((process.pid, address))
            for run in super().checksum(process, address, pages, **how):
                yield Run(run.address + 4096 * process.pid, run.records, 0)

    look(cast(Module, Recording({})), [one, other], 100)
    assert asked == [(1, 7 << REGION_SHIFT), (2, 9 << REGION_SHIFT)]
    numbers = [int(work.target.regions.words_of(0)[0]) >> 15 & 511 for work in (one, other)]
    assert numbers == [1, 2]
