# SPDX-License-Identifier: MIT
"""The stages together, on real processes, with a model of the kernel module's contract.

The model keeps one page table per process, in the first region of it: contents, frames and map
counts. What the real module makes of such requests is tested in tests/kernel.
"""

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from mergemem_agent.budget import Budget
from mergemem_agent.contract import RECORD, RESULT, Result, State
from mergemem_agent.module import AccessDenied, Limits, Module, ModuleMissing, Run
from mergemem_agent.pipeline import Pipeline
from mergemem_agent.policy import DomainKind, Glob, Policy, PolicySet, Selector
from mergemem_agent.procfs import ProcessId, ProcFs
from mergemem_agent.region import REGION_SHIFT

Array = np.ndarray[Any, np.dtype[Any]]

SLEEPER = os.path.realpath("/bin/sleep")
PAGES = 300
PROCESSES = 3


class ModelModule:
    """Answers CHECKSUM and MERGE as uapi/mergemem.h says, for pages that exist here only."""

    def __init__(self, max_mappings: int = 1000) -> None:
        self.limits = Limits(8, 50, 100, max_mappings, 0)
        self.base: dict[ProcessId, int] = {}
        self.content: dict[tuple[ProcessId, int], int] = {}
        self.frame: dict[tuple[ProcessId, int], int] = {}
        self.shared: set[int] = set()
        self.requests = 0
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

    def map_counts(self) -> Counter[int]:
        return Counter(self.frame.values())

    @property
    def frames(self) -> int:
        return len(self.map_counts())

    def checksum(self, process: ProcessId, address: int, pages: int, **_: object) -> Iterator[Run]:
        base, counts = self.base.get(process, 0), self.map_counts()
        if not address <= base < address + pages * 4096:
            return
        held = sorted(page for owner, page in self.content if owner == process)
        records = np.zeros(len(held), dtype=RECORD)
        for page in held:
            frame = self.frame[process, page]
            state = State.MERGED if frame in self.shared else State.ANON
            checksum = (self.content[process, page] + 1) * 0x9E37_79B9_7F4A_7C15 % 2**64
            records[page] = (checksum, counts[frame], state, 0)
        yield Run(base, records, 0)

    def merge(self, processes: Sequence[ProcessId], candidates: Array, _: object) -> Array:
        assert len(processes) <= self.limits.max_processes
        assert len(candidates) <= self.limits.max_candidates
        self.requests += 1
        if self.answer is not None:
            return np.full(len(candidates), self.answer, dtype=RESULT)
        results = np.zeros(len(candidates), dtype=RESULT)
        for group in np.unique(candidates["group"]):
            (members,) = np.nonzero(candidates["group"] == group)
            for member, result in zip(
                members, self._merge_group(processes, candidates[members]), strict=True
            ):
                results[member] = result
        return results

    def _merge_group(self, processes: Sequence[ProcessId], group: Array) -> list[Result]:
        pages = []
        for candidate in group:
            process = processes[int(candidate["process"])]
            pages.append((process, (int(candidate["address"]) - self.base[process]) // 4096))
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


@pytest.fixture
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    # Half of the pages are the same in all processes, at the same place; the rest are unique.
    opened = Scene(
        ModelModule(getattr(request, "param", 1000)),
        lambda process, page: page if page % 2 else 1000 * (process + 1) + page,
    )
    yield opened
    opened.close()


SHARED = PAGES // 2
ALL_SHARED = PROCESSES * PAGES - (PROCESSES - 1) * SHARED


def test_everything_equal_is_merged_and_nothing_is_asked_twice(scene: Scene) -> None:
    scene.until_frames(ALL_SHARED)
    counts, memory = scene.pipeline.counts, scene.pipeline.memory()["scene"]
    # Whoever settles late joins by way of an anchor, which shares its frame already.
    assert set(counts.results) <= {Result.SUCCESS, Result.ALREADYSH}
    assert counts.results[Result.SUCCESS] == SHARED * PROCESSES
    assert counts.nominated == {"host": counts.results.total()}
    assert counts.freed_pages == SHARED * (PROCESSES - 1)
    asked = scene.module.requests
    scene.rounds(3)
    assert scene.module.requests == asked
    assert memory.targets >= PROCESSES


def test_saved_bytes_agree_with_the_frames(scene: Scene) -> None:
    scene.until(lambda: scene.pipeline.memory()["scene"].merged_pages == SHARED * PROCESSES)
    memory = scene.pipeline.memory()["scene"]
    assert memory.saved_bytes == pytest.approx(4096 * SHARED * (PROCESSES - 1))


def test_one_look_is_not_enough(scene: Scene) -> None:
    settle_slowly = replace(scene.policy, settle_seconds=1000)
    scene.pipeline.change_policies(PolicySet(policies=(settle_slowly,)), Budget(100.0, {}))
    scene.rounds(3)
    assert scene.module.requests == 0
    assert scene.pipeline.counts.policies["scene"].checksummed == PAGES * PROCESSES
    assert scene.pipeline.counts.policies["scene"].settled == 0


def test_a_page_that_is_written_to_joins_again_when_it_settles(scene: Scene) -> None:
    scene.until_frames(ALL_SHARED)
    process = next(iter(scene.module.base))
    scene.module.write(process, 1, 1)
    assert scene.module.frames == ALL_SHARED + 1
    scene.until_frames(ALL_SHARED)


@pytest.mark.parametrize("scene", [2], indirect=True)
def test_a_full_frame_is_left_for_a_new_one(scene: Scene) -> None:
    # Three equal pages, and two mappings a frame: the third page can share with nobody.
    scene.until_frames(PROCESSES * PAGES - SHARED)
    assert max(scene.module.map_counts().values()) == 2


def test_without_memory_merging_rests(scene: Scene) -> None:
    scene.module.answer = Result.NOMEM
    scene.until(lambda: scene.module.requests > 0)
    scene.rounds(3)
    assert scene.module.requests == 1
    assert scene.pipeline.counts.results[Result.NOMEM] > 0


@pytest.mark.parametrize("result", [Result.NOTEQUAL, Result.BUSY, Result.PINNED, Result.ALONE])
def test_what_fails_is_tried_again_later(scene: Scene, result: Result) -> None:
    scene.module.answer = result
    scene.until(lambda: scene.module.requests > 0)
    assert scene.module.frames == PROCESSES * PAGES
    scene.module.answer = None
    scene.until_frames(ALL_SHARED)


def test_a_round_may_end_after_any_slice(scene: Scene) -> None:
    class Over(Exception):
        pass

    slices = 0

    def end_after_few() -> None:
        nonlocal slices
        slices += 1
        if slices % 3 == 0:
            raise Over

    scene.pace = end_after_few
    deadline = time.monotonic() + 30
    while scene.module.frames > ALL_SHARED and time.monotonic() < deadline:
        try:
            scene.rounds(1)
        except Over:
            time.sleep(0.01)
    assert scene.module.frames == ALL_SHARED
    assert scene.pipeline.counts.results[Result.NOTEQUAL] == 0


def test_a_refused_process_is_dropped_and_the_others_are_merged(scene: Scene) -> None:
    refused = next(iter(scene.module.base))
    plain = scene.module.checksum

    def checksum(process: ProcessId, *arguments: Any, **named: Any) -> Iterator[Run]:
        if process == refused:
            raise AccessDenied("the kernel module says: not dumpable")
        return plain(process, *arguments, **named)

    scene.module.checksum = checksum  # type: ignore[method-assign]
    scene.rounds(4)
    assert refused not in [target.process for target in scene.pipeline.targets]
    assert scene.module.frames == PROCESSES * PAGES - SHARED * (PROCESSES - 2)


def test_a_missing_module_ends_the_round(scene: Scene) -> None:
    def checksum(*_: object, **__: object) -> Iterator[Run]:
        raise ModuleMissing("the kernel module mergemem was unloaded")

    scene.module.checksum = checksum  # type: ignore[method-assign]
    with pytest.raises(ModuleMissing):
        scene.rounds(1)


def test_after_a_reload_of_the_module_nothing_is_remembered(scene: Scene) -> None:
    scene.rounds(2)
    assert scene.pipeline.memory()["scene"].remembered_pages
    scene.pipeline.forget_pages()
    assert scene.pipeline.memory()["scene"].remembered_pages == 0
    scene.until_frames(ALL_SHARED)


def test_domains_are_never_mixed() -> None:
    scene = Scene(ModelModule(), lambda _, page: page // 2)
    try:
        scene.pipeline.find_targets()
        for target in scene.pipeline.targets:
            target.domain = f"domain of {target.process.pid}"
        # Each page has one equal in its own process, and two in each of the others.
        scene.until_frames(PROCESSES * PAGES // 2)
        scene.rounds(3)
        owners = {(frame, process) for (process, _), frame in scene.module.frame.items()}
        assert len(owners) == scene.module.frames == PROCESSES * PAGES // 2
    finally:
        scene.close()
