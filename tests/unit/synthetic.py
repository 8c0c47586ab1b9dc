# SPDX-License-Identifier: MIT
"""A host of processes that exist in arrays only: as many as one likes, and what they hold is known.

It answers as /proc and as the kernel module do, in time that does not count beside the agent's own.
What the agent makes of real processes is tested in test_pipeline.py and in tests/kernel.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np

from mergemem_agent.budget import Budget
from mergemem_agent.contract import (
    DEPTH_FULL_BYTES,
    GROUP_ZERO,
    PAGE_BYTES,
    RECORD,
    RESULT,
    Result,
    State,
)
from mergemem_agent.info import Limits
from mergemem_agent.module import Module, NoSuchProcess, Run
from mergemem_agent.pipeline import Pipeline
from mergemem_agent.policy import DomainKind, Glob, Policy, PolicySet, Selector
from mergemem_agent.procfs import Mapping, Process, ProcessGone, ProcessId, ProcFs
from mergemem_agent.region import REGION_PAGES, REGION_SHIFT

Array = np.ndarray[Any, np.dtype[Any]]

LIMITS = Limits(1024, 4000, 16384, 4096, 0)
FIRST_REGION = 64
FIRST_ADDRESS = FIRST_REGION << REGION_SHIFT
ZEROS = 0  # the content of a page of zeros
SAME_SAMPLE = 1 << 40  # contents that differ by a multiple of this have the same sample


def policy(settle_seconds: float = 0.0) -> PolicySet:
    """Return policies that choose everybody, as one domain."""
    everybody = Policy(
        "all",
        Selector(executable=Glob("/synthetic")),
        domain=DomainKind.HOST,
        settle_seconds=settle_seconds,
    )
    return PolicySet(policies=(everybody,))


class Memory:
    """The pages of one process, from FIRST_ADDRESS on: a content and a frame for each."""

    def __init__(self, contents: Array) -> None:
        self.contents = contents.astype(np.uint64)
        self.frames = np.zeros(len(contents), dtype=np.int64)
        self.merged = np.zeros(len(contents), dtype=np.bool_)
        self.zeroed = np.zeros(len(contents), dtype=np.bool_)  # the kernel's zero page is there


class Host:
    """Processes by pid, and what was asked about them."""

    def __init__(self) -> None:
        self.memories: dict[int, Memory] = {}
        self.ages: dict[int, float] = {}
        self._ids: dict[int, ProcessId] = {}
        self.map_counts: Array = np.zeros(1 << 10, dtype=np.uint32)
        self.frames = 1
        self.read: Counter[int] = Counter()  # pages, by how many bytes of them were read
        self.looks: list[tuple[int, int, int]] = []  # pid, number of the first region, how many
        self.refused: Result | None = None
        self.mappings_read = 0

    # --- what processes do --------------------------------------------------------------------

    def start(self, pid: int, contents: Array, age_seconds: float = 1000.0) -> Memory:
        memory = self.memories[pid] = Memory(contents)
        self.ages[pid] = age_seconds
        born = time.clock_gettime(time.CLOCK_BOOTTIME) - age_seconds
        ticks = max(1, int(born * os.sysconf("SC_CLK_TCK")))
        self._ids[pid] = ProcessId(pid, ticks)
        self._own_frames(memory, np.arange(len(contents)))
        return memory

    def end(self, pid: int) -> None:
        memory = self.memories.pop(pid)
        np.subtract.at(self.map_counts, memory.frames, 1)

    def write(self, pid: int, pages: Array, contents: Array) -> None:
        memory = self.memories[pid]
        np.subtract.at(self.map_counts, memory.frames[pages], 1)
        memory.contents[pages] = contents
        memory.merged[pages] = memory.zeroed[pages] = False
        self._own_frames(memory, pages)

    def _own_frames(self, memory: Memory, pages: Array) -> None:
        memory.frames[pages] = self._new_frames(len(pages))
        self.map_counts[memory.frames[pages]] = 1

    def _new_frames(self, count: int) -> Array:
        first, self.frames = self.frames, self.frames + count
        while self.frames > len(self.map_counts):
            self.map_counts = np.concatenate([self.map_counts, np.zeros_like(self.map_counts)])
        return np.arange(first, self.frames)

    def merged_pages(self) -> int:
        return sum(int(memory.merged.sum()) for memory in self.memories.values())

    # --- /proc --------------------------------------------------------------------------------

    def process_ids(self) -> list[ProcessId]:
        return [self._ids[pid] for pid in sorted(self.memories)]

    def id(self, pid: int) -> ProcessId:
        return self._ids[pid]

    def process(self, pid: int) -> Process | None:
        if pid not in self.memories:
            return None
        size = len(self.memories[pid].contents) * PAGE_BYTES
        return Process(self._ids[pid], 1, 0, "/synthetic", ("s",), "/", size, self.ages[pid], False)

    def mappings(
        self,
        pid: int,
        with_flags: bool = False,  # noqa: ARG002
        anonymous: bool = False,  # noqa: ARG002
    ) -> list[Mapping]:
        self.mappings_read += 1
        if pid not in self.memories:
            raise ProcessGone(f"no process {pid}")
        end = FIRST_ADDRESS + len(self.memories[pid].contents) * PAGE_BYTES
        return [Mapping(FIRST_ADDRESS, end, "rw-p", 0, "", frozenset())]

    # --- the kernel module --------------------------------------------------------------------

    def checksum(
        self,
        process: ProcessId,
        address: int,
        pages: int,
        depth_bytes: int = DEPTH_FULL_BYTES,
        undumpable: bool = False,  # noqa: ARG002
        full: Array | None = None,
    ) -> Iterator[Run]:
        memory = self.memories.get(process.pid)
        if memory is None:
            raise NoSuchProcess(f"no process {process.pid}")
        first = (address - FIRST_ADDRESS) // PAGE_BYTES
        self.looks.append((process.pid, address >> REGION_SHIFT, pages // REGION_PAGES))
        here = slice(first, first + pages)
        contents, merged = memory.contents[here], memory.merged[here]
        depth = np.full(len(contents), depth_bytes)
        if full is not None:
            depth[merged] = 0
            depth[full[: len(contents)]] = DEPTH_FULL_BYTES
        for bytes_read in np.unique(depth).tolist():
            self.read[bytes_read] += int(np.count_nonzero(depth == bytes_read))
        sample = _mixed(contents % SAME_SAMPLE) | np.uint64(1 << 60)
        whole = _mixed(~contents) >> np.uint64(32)
        records = np.zeros(len(contents), dtype=RECORD)
        records["checksum"] = np.where(depth > 0, sample >> np.uint64(32) << np.uint64(32), 0)
        records["checksum"] |= np.where(depth == DEPTH_FULL_BYTES, whole, np.uint64(0))
        records["map_count"] = self.map_counts[memory.frames[here]]
        records["state"] = np.where(merged, State.MERGED, State.ANON)
        records["state"][(contents == ZEROS) & (depth > 0) & ~merged] = State.ZERO
        records[memory.zeroed[here]] = (0, 0, State.ZERO_PAGE, 0)
        yield Run(address, records, 0)

    def merge(
        self, processes: Sequence[ProcessId], candidates: Array, *_: object, **__: object
    ) -> Array:
        results = np.full(len(candidates), self.refused or Result.SUCCESS, dtype=RESULT)
        if self.refused is not None:
            return results
        pages = (candidates["address"].astype(np.int64) - FIRST_ADDRESS) // PAGE_BYTES
        owners = [self.memories[process.pid] for process in processes]
        contents = np.zeros(len(candidates), dtype=np.uint64)
        frames, merged = np.zeros(len(candidates), dtype=np.int64), np.zeros(len(candidates), bool)
        for index, memory in enumerate(owners):
            mine = candidates["process"] == index
            contents[mine], frames[mine] = memory.contents[pages[mine]], memory.frames[pages[mine]]
            merged[mine] = memory.merged[pages[mine]]
        groups = candidates["group"].astype(np.int64)
        if (groups == GROUP_ZERO).any():
            assert (groups == GROUP_ZERO).all()
            for index, memory in enumerate(owners):
                mine = (candidates["process"] == index) & (contents == ZEROS)
                memory.zeroed[pages[mine]] = True
            return np.where(contents == ZEROS, Result.ZEROED, Result.NOTEQUAL).astype(RESULT)
        order = np.lexsort((~merged, groups))
        starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
        leader = np.repeat(order[starts], np.diff(starts, append=len(order)))
        equal = np.empty(len(order), dtype=bool)
        equal[order] = contents[order] == contents[leader]
        anchored = np.empty(len(order), dtype=np.int64)
        fresh = self._new_frames(len(starts))
        target = np.where(merged[order[starts]], frames[order[starts]], fresh)
        anchored[order] = np.repeat(target, np.diff(starts, append=len(order)))
        results[~equal] = Result.NOTEQUAL
        alone = (
            equal
            & ~merged
            & (np.bincount(groups[equal], minlength=int(groups.max()) + 1)[groups] < 2)
        )
        results[alone] = Result.ALONE
        equal &= ~alone
        results[equal & merged & (frames == anchored)] = Result.ALREADYSH
        np.subtract.at(self.map_counts, frames[equal], 1)
        np.add.at(self.map_counts, anchored[equal], 1)
        for index, memory in enumerate(owners):
            mine = equal & (candidates["process"] == index)
            memory.frames[pages[mine]], memory.merged[pages[mine]] = anchored[mine], True
        return results

    def pipeline(
        self, policies: PolicySet | None = None, pace: Callable[[], None] = lambda: None
    ) -> Pipeline:
        """Return a pipeline over this host."""
        return Pipeline(policies or policy(), cast(ProcFs, self), Budget(100.0, {}), pace)

    def round(self, pipeline: Pipeline) -> None:
        """Do one round, as if the processes had to be looked for."""
        pipeline.round(cast(Module, self), LIMITS)


def _mixed(contents: Array) -> Array:
    """Return 64 well-mixed bits of each content."""
    values = (contents + np.uint64(1)) * np.uint64(0x9E37_79B9_7F4A_7C15)
    values ^= values >> np.uint64(29)
    values *= np.uint64(0xBF58_476D_1CE4_E5B9)
    return values ^ values >> np.uint64(32)
