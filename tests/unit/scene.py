# SPDX-License-Identifier: MIT
"""Real processes, a model of the kernel module's contract, and a pipeline over both.

The model keeps one page table per process, in the first region of it: contents, frames and map
counts. What the real module makes of such requests is tested in tests/kernel.
"""

import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np

from mergemem_agent.budget import Budget
from mergemem_agent.contract import DEPTH_FULL_BYTES, GROUP_ZERO, RECORD, RESULT, Result, State
from mergemem_agent.info import Limits
from mergemem_agent.module import Module, Run
from mergemem_agent.pipeline import Pipeline
from mergemem_agent.policy import (
    DomainKind,
    Glob,
    Policy,
    PolicySet,
    Selector,
)
from mergemem_agent.procfs import ProcessId, ProcFs
from mergemem_agent.region import REGION_SHIFT
from tests.unit.sleeper import SLEEPER

Array = np.ndarray[Any, np.dtype[Any]]

PAGES = 300
PROCESSES = 3
ZEROS = -1  # the content of a page of zeros
FOLIO_ORDER = 8
FOLIO_PAGES = 1 << FOLIO_ORDER


def mixed(content: int) -> int:
    """Return 64 well-mixed bits of a page's content, never 0."""
    value = (content + 2) * 0x9E37_79B9_7F4A_7C15 % 2**64
    return (value ^ value >> 29) * 0xBF58_476D_1CE4_E5B9 % 2**64 | 1 << 40


class ModelModule:
    """Answers CHECKSUM and MERGE as uapi/mergemem.h says, for pages that exist here only."""

    def __init__(self, max_mappings: int = 1000) -> None:
        self.limits = Limits(8, 50, 100, max_mappings, 0)
        self.base: dict[ProcessId, int] = {}
        self.content: dict[tuple[ProcessId, int], int] = {}
        self.frame: dict[tuple[ProcessId, int], int] = {}
        self.shared: set[int] = set()
        self.folios: set[ProcessId] = set()  # whose first pages are a large folio
        self.zeroed: set[tuple[ProcessId, int]] = set()
        self.requests = 0
        self.read: Counter[int] = Counter()  # pages, by how many bytes of them were read
        self.same_samples = 1
        self.asked: list[dict[str, object]] = []  # what requests said beside their candidates
        self.answer: Result | None = None  # to all candidates, in place of merging
        self._frames = 0

    def add(self, process: ProcessId, address: int, contents: Sequence[int]) -> None:
        self.base[process] = address
        for page, content in enumerate(contents):
            self.content[process, page] = content
            self.write(process, page, content)

    def write(self, process: ProcessId, page: int, content: int) -> None:
        """Do as a process that writes: it gets a frame of its own."""
        self._frames += 1
        self.content[process, page], self.frame[process, page] = content, self._frames
        self.zeroed.discard((process, page))

    def map_counts(self) -> Counter[int]:
        return Counter(self.frame.values())

    @property
    def frames(self) -> int:
        return len(self.map_counts())

    def checksum(
        self,
        process: ProcessId,
        address: int,
        pages: int,
        depth_bytes: int = DEPTH_FULL_BYTES,
        undumpable: bool = False,  # noqa: ARG002
        full: Array | None = None,
    ) -> Iterator[Run]:
        base, counts = self.base.get(process, 0), self.map_counts()
        if not address <= base < address + pages * 4096:
            return
        held = sorted(page for owner, page in self.content if owner == process)
        records = np.zeros(len(held), dtype=RECORD)
        for page in held:
            frame = self.frame[process, page]
            state = State.MERGED if frame in self.shared else State.ANON
            order = FOLIO_ORDER if self._in_folio(process, page) else 0
            if (process, page) in self.zeroed:
                state, frame = State.ZERO_PAGE, 0
            elif self.content[process, page] == ZEROS:
                state = State.ZERO
            elif order:
                state = State.HUGE
            depth = depth_bytes
            if full is not None:
                in_full = full[(base - address) // 4096 + page]
                depth = 4096 if in_full else 0 if state == State.MERGED else depth
            if state == State.ZERO_PAGE:
                depth = 0
            if state == State.ZERO and not depth:
                state = State.HUGE if order else State.ANON
            self.read[depth] += 1
            records[page] = (
                self._checksum(self.content[process, page], depth),
                counts[frame],
                state,
                order,
            )
        yield Run(base, records, 0)

    def _checksum(self, content: int, depth_bytes: int) -> int:
        """Return what CHECKSUM tells of a page; same_samples of neighbours look equal by sample."""
        sample = mixed(content // self.same_samples) >> 32 << 32
        whole = mixed(content) & 0xFFFF_FFFF
        return sample | whole if depth_bytes == DEPTH_FULL_BYTES else sample if depth_bytes else 0

    def _in_folio(self, process: ProcessId, page: int) -> bool:
        return process in self.folios and page < FOLIO_PAGES

    def merge(
        self,
        processes: Sequence[ProcessId],
        candidates: Array,
        undumpable: object,  # noqa: ARG002
        any_node: bool,
        split_percent: int | None,
    ) -> Array:
        assert len(processes) <= self.limits.max_processes
        assert len(candidates) <= self.limits.max_candidates
        self.requests += 1
        self.asked.append({"any_node": any_node, "split_percent": split_percent})
        if self.answer is not None:
            return np.full(len(candidates), self.answer, dtype=RESULT)
        self._split(processes, candidates, split_percent or 101)
        results = np.zeros(len(candidates), dtype=RESULT)
        for group in np.unique(candidates["group"]):
            (members,) = np.nonzero(candidates["group"] == group)
            merge = self._replace_zeros if group == GROUP_ZERO else self._merge_group
            for member, result in zip(
                members, merge(self._pages(processes, candidates[members])), strict=True
            ):
                results[member] = result
        return results

    def _pages(
        self, processes: Sequence[ProcessId], candidates: Array
    ) -> list[tuple[ProcessId, int]]:
        pages = []
        for candidate in candidates:
            process = processes[int(candidate["process"])]
            pages.append((process, (int(candidate["address"]) - self.base[process]) // 4096))
        return pages

    def _split(self, processes: Sequence[ProcessId], candidates: Array, split_percent: int) -> None:
        named = Counter(p for p, n in self._pages(processes, candidates) if self._in_folio(p, n))
        for process, pages in named.items():
            if pages * 100 >= split_percent * FOLIO_PAGES:
                self.folios.discard(process)

    def _replace_zeros(self, pages: list[tuple[ProcessId, int]]) -> list[Result]:
        results = []
        for page in pages:
            fits = self.content[page] == ZEROS and not self._in_folio(*page)
            results.append(Result.ZEROED if fits else Result.NOTEQUAL)
            if fits:
                self.frame[page] = 0
                self.zeroed.add(page)
        return results

    def _merge_group(self, pages: list[tuple[ProcessId, int]]) -> list[Result]:
        if any(self._in_folio(*page) for page in pages):
            return [Result.HUGE] * len(pages)
        anchor = next((page for page in pages if self.frame[page] in self.shared), None)
        self._frames += 1
        frame = self.frame[anchor] if anchor else self._frames
        content = self.content[anchor or pages[0]]
        self.shared.add(frame)
        return [self._join(page, frame, content) for page in pages]

    def _join(self, page: tuple[ProcessId, int], frame: int, content: int) -> Result:
        if self.frame[page] == frame:
            return Result.ALREADYSH
        if self.content[page] != content:
            return Result.NOTEQUAL
        if self.map_counts()[frame] >= self.limits.max_mappings:
            return Result.MOREMAP
        self.frame[page] = frame
        return Result.SUCCESS


class Scene:
    """Processes, the pages that they share in the model, and a pipeline over both."""

    def __init__(self, module: ModelModule, contents: Callable[[int, int], int]) -> None:
        self.module = module
        self.pace: Callable[[], None] = lambda: None
        self.processes = [subprocess.Popen([SLEEPER, "600"]) for _ in range(PROCESSES)]
        pids = {process.pid for process in self.processes}
        deadline = time.monotonic() + 20
        procfs = ProcFs()
        for index, pid in enumerate(sorted(pids)):
            while (seen := procfs.process(pid)) is None or seen.executable != SLEEPER:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            while not (heap := [m.start for m in procfs.mappings(pid) if m.anonymous]):
                assert time.monotonic() < deadline
            base = heap[0] >> REGION_SHIFT << REGION_SHIFT
            module.add(seen.id, base, [contents(index, page) for page in range(PAGES)])
        policy = Policy(
            "scene", Selector(executable=Glob(SLEEPER)), domain=DomainKind.HOST, settle_seconds=0.01
        )
        self.policy = policy
        self.pipeline = Pipeline(
            PolicySet(policies=(policy,)), procfs, Budget(100.0, {}), lambda: self.pace()
        )

    def rounds(self, count: int) -> None:
        for _ in range(count):
            self.pipeline.round(cast(Module, self.module), self.module.limits)
            time.sleep(max(0.02, min(0.3, self.pipeline.idle_seconds())))

    def until(self, condition: Callable[[], bool]) -> None:
        """Do rounds until something is so; how many that takes depends on the machine's load."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "rounds led to nothing"
            self.rounds(1)

    def until_frames(self, frames: int) -> None:
        self.until(lambda: self.module.frames == frames)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
