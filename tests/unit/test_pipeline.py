# SPDX-License-Identifier: MIT
"""The stages together, on real processes, with a model of the kernel module's contract.

The model keeps one page table per process, in the first region of it: contents, frames and map
counts. What the real module makes of such requests is tested in tests/kernel.
"""

import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from mergemem_agent import pipeline
from mergemem_agent.budget import Budget
from mergemem_agent.contract import DEPTH_FULL_BYTES, GROUP_ZERO, RECORD, RESULT, Result, State
from mergemem_agent.hint import ProcessEvents
from mergemem_agent.info import Limits
from mergemem_agent.module import AccessDenied, Module, ModuleMissing, Run
from mergemem_agent.pipeline import Pipeline
from mergemem_agent.policy import (
    AgentSettings,
    DomainKind,
    Glob,
    HugePages,
    NumaNodes,
    Policy,
    PolicySet,
    Selector,
)
from mergemem_agent.procfs import ProcessId, ProcFs
from mergemem_agent.region import REGION_SHIFT, Regions
from mergemem_agent.search import search
from mergemem_agent.zero import zero_requests
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


def test_endless_scanning_keeps_nothing_from_being_merged(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is written to all the time, some region is always due."""
    hourly = AgentSettings(rescan_seconds=3600)
    policies = PolicySet(agent=hourly, policies=(scene.policy,))
    scene.pipeline.change_policies(policies, Budget(100.0, {}))
    scan, deadline = scene.pipeline._scan, time.monotonic() + 60

    def always_due(module: Module, limits: Limits) -> bool:
        assert time.monotonic() < deadline, "the round does not end"
        scan(module, limits)
        time.sleep(0.001)
        return True

    monkeypatch.setattr(scene.pipeline, "_scan", always_due)
    monkeypatch.setattr(pipeline, "SCAN_SECONDS", 0.1)
    scene.until_frames(ALL_SHARED)


def test_endless_syncs_keep_nothing_from_being_scanned(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small budget, reading /proc may take longer than the time to the next reading."""
    monkeypatch.setattr(scene.pipeline, "_sync_is_due", lambda: True)
    scene.until_frames(ALL_SHARED)


def test_a_process_may_end_in_the_middle_of_a_search(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages are among those that the search is about, and have found partners in it."""
    last = max(process.pid for process in scene.processes)
    searching, ended = [False], [False]

    def watched(*arguments: Any) -> Iterator[Any]:
        searching[0] = True
        yield from search(*arguments)
        searching[0] = False

    def events() -> ProcessEvents:
        if not searching[0] or ended[0]:
            return ProcessEvents()
        ended[0] = True
        return ProcessEvents(ended=frozenset([last]))

    def write_the_same() -> None:
        for process in scene.module.base:
            scene.module.write(process, 2, 10**6 + scene.pipeline.counts.rounds)

    def pace() -> None:
        scene.pipeline.follow_events()

    monkeypatch.setattr(pipeline, "search", watched)
    monkeypatch.setattr(scene.pipeline, "_events", events)
    scene.pace = pace
    deadline = time.monotonic() + 60
    while not ended[0]:
        assert time.monotonic() < deadline
        write_the_same()
        scene.rounds(1)
    scene.rounds(2)
    assert scene.pipeline.counts.results[Result.SUCCESS] > 0
    assert last not in {target.process.pid for target in scene.pipeline.targets}


def test_one_look_is_not_enough(scene: Scene) -> None:
    settle_slowly = replace(scene.policy, settle_seconds=1000)
    scene.pipeline.change_policies(PolicySet(policies=(settle_slowly,)), Budget(100.0, {}))
    counts = scene.pipeline.counts.policy("scene")
    scene.until(lambda: counts.checksummed > 0)
    scene.rounds(3)
    assert scene.module.requests == 0
    assert (counts.sampled, counts.checksummed) == (PAGES * PROCESSES, SHARED * PROCESSES)
    assert counts.settled == 0


def test_only_what_has_a_partner_is_read_in_full_and_only_equals_twice(scene: Scene) -> None:
    scene.module.same_samples = 4  # so that each page has a partner, by its sample
    scene.until_frames(ALL_SHARED)
    pages = PROCESSES * PAGES
    assert scene.module.read[DEPTH_FULL_BYTES] == pages + PROCESSES * SHARED
    scene.rounds(5)
    assert scene.module.read[DEPTH_FULL_BYTES] == pages + PROCESSES * SHARED


def test_what_is_unique_is_never_read_in_full(scene: Scene) -> None:
    scene.until_frames(ALL_SHARED)
    scene.rounds(5)
    assert scene.module.read[DEPTH_FULL_BYTES] == 2 * PROCESSES * SHARED


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


# --- zeros ---------------------------------------------------------------------------------------


@pytest.fixture
def zero_scene() -> Iterator[Scene]:
    """Each process has 100 pages of zeros; the others are unique."""
    opened = Scene(
        ModelModule(), lambda process, page: ZEROS if page < 100 else 1000 * (process + 1) + page
    )
    yield opened
    opened.close()


def test_zeros_are_replaced_across_domains_and_counted_apart(zero_scene: Scene) -> None:
    zero_scene.pipeline.find_targets()
    for target in zero_scene.pipeline.targets:
        target.domain = f"domain of {target.process.pid}"
    zero_scene.until(lambda: len(zero_scene.module.zeroed) == 100 * PROCESSES)
    counts = zero_scene.pipeline.counts
    assert set(counts.results) == {Result.ZEROED}
    assert counts.policies["scene"].zeroed == counts.zero_freed_pages == 100 * PROCESSES
    assert counts.freed_pages == counts.split_freed_pages == 0
    zero_scene.until(lambda: zero_scene.pipeline.memory()["scene"].zero_pages == 0)
    assert zero_scene.pipeline.memory()["scene"].saved_bytes == 0
    asked = zero_scene.module.requests
    zero_scene.rounds(3)
    assert zero_scene.module.requests == asked


def test_a_policy_may_leave_zeros_alone(zero_scene: Scene) -> None:
    without = replace(zero_scene.policy, zero_pages=False)
    zero_scene.pipeline.change_policies(PolicySet(policies=(without,)), Budget(100.0, {}))
    zero_scene.rounds(5)
    assert zero_scene.module.requests == 0
    assert zero_scene.pipeline.memory()["scene"].zero_pages == 100 * PROCESSES


def test_a_process_may_end_while_its_zeros_are_replaced(
    zero_scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its table is still being read: it goes afterwards, not meanwhile."""
    targets_left, pages_meanwhile = list[int](), list[int]()

    def watched(processes: Sequence[Regions], *limits: int) -> Iterator[Any]:
        for request in zero_requests(processes, *limits):
            yield request
            targets_left.append(len(list(zero_scene.pipeline.targets)))
            pages_meanwhile.append(sum(regions.pages for regions in processes))

    def events() -> ProcessEvents:
        return ProcessEvents(ended=ended) if zero_scene.module.requests else ProcessEvents()

    def pace() -> None:
        zero_scene.pipeline.follow_events()

    ended = frozenset(process.pid for process in zero_scene.processes)
    monkeypatch.setattr(pipeline, "zero_requests", watched)
    monkeypatch.setattr(zero_scene.pipeline, "_events", events)
    zero_scene.pace = pace
    zero_scene.until(lambda: bool(targets_left))
    assert targets_left[0] == 0
    assert pages_meanwhile[0] == PROCESSES * PAGES
    assert zero_scene.pipeline.memory()["scene"].remembered_pages == 0


# --- huge pages ----------------------------------------------------------------------------------


@pytest.fixture
def huge_scene(scene: Scene) -> Scene:
    """As scene, but that the first 256 pages of each process are one large folio."""
    scene.module.limits = Limits(8, 4000, 100, 1000, 0)
    scene.module.folios = set(scene.module.base)
    return scene


def split(scene: Scene, percent: int) -> None:
    policy = replace(scene.policy, huge=HugePages.SPLIT, split_percent=percent)
    scene.pipeline.change_policies(PolicySet(policies=(policy,)), Budget(100.0, {}))


def test_huge_pages_are_split_and_merged(huge_scene: Scene) -> None:
    split(huge_scene, 25)
    huge_scene.until_frames(ALL_SHARED)
    counts = huge_scene.pipeline.counts
    assert counts.policies["scene"].split_folios == PROCESSES
    assert counts.split_freed_pages + counts.freed_pages == SHARED * (PROCESSES - 1)
    assert counts.split_freed_pages > 0
    assert {"any_node": False, "split_percent": 25} in huge_scene.module.asked


def test_without_a_word_huge_pages_stay_whole(huge_scene: Scene) -> None:
    small = (PAGES - FOLIO_PAGES) // 2
    huge_scene.until_frames(PROCESSES * PAGES - small * (PROCESSES - 1))
    huge_scene.rounds(3)
    assert huge_scene.module.folios == set(huge_scene.module.base)
    assert huge_scene.pipeline.memory()["scene"].huge_pages == FOLIO_PAGES * PROCESSES


def test_another_word_on_huge_pages_is_heeded_at_once(huge_scene: Scene) -> None:
    small = (PAGES - FOLIO_PAGES) // 2
    huge_scene.until_frames(PROCESSES * PAGES - small * (PROCESSES - 1))
    for target in huge_scene.pipeline.targets:  # as after hours of calm
        target.regions.rows["due"] = time.monotonic() + 1000
    split(huge_scene, 51)  # exactly half of the pages are equal
    huge_scene.until(lambda: bool(huge_scene.pipeline.memory()["scene"].huge_pages))
    huge_scene.rounds(3)
    assert huge_scene.module.folios == set(huge_scene.module.base)
    split(huge_scene, 50)
    huge_scene.until_frames(ALL_SHARED)


def test_below_the_share_huge_pages_stay_whole(huge_scene: Scene) -> None:
    split(huge_scene, 51)  # exactly half of the pages are equal
    small = (PAGES - FOLIO_PAGES) // 2
    huge_scene.until_frames(PROCESSES * PAGES - small * (PROCESSES - 1))
    huge_scene.rounds(3)
    assert huge_scene.module.folios == set(huge_scene.module.base)


# --- what requests are told ----------------------------------------------------------------------


def test_any_node_is_passed_on(scene: Scene) -> None:
    policy = replace(scene.policy, numa=NumaNodes.ANY)
    scene.pipeline.change_policies(PolicySet(policies=(policy,)), Budget(100.0, {}))
    scene.until_frames(ALL_SHARED)
    assert {asked["any_node"] for asked in scene.module.asked} == {True}


def test_what_lies_on_another_node_is_not_tried_at_once(scene: Scene) -> None:
    scene.module.answer = Result.NODE
    scene.until(lambda: scene.module.requests > 0)
    asked = scene.module.requests
    rows = [target.regions.rows for target in scene.pipeline.targets]
    before = {float(due) for table in rows for due in table["interval"]}
    scene.until(lambda: scene.module.requests > 2 * asked + 2)
    after = max(
        float(due) for target in scene.pipeline.targets for due in target.regions.rows["interval"]
    )
    assert after > max(before), "each time after a longer pause"


@pytest.mark.parametrize("whose", ["policy", "agent"])
def test_a_cap_is_kept_and_told(scene: Scene, whose: str) -> None:
    cap_bytes = 50 * 4096
    policy = replace(scene.policy, max_shared_bytes=cap_bytes if whose == "policy" else None)
    agent = AgentSettings(max_shared_bytes=cap_bytes if whose == "agent" else None)
    policies = PolicySet(agent=agent, policies=(policy,))
    scene.pipeline.change_policies(policies, Budget(100.0, {}))
    scene.until(lambda: len(scene.module.shared) == 50)
    scene.rounds(8)
    assert len(scene.module.shared) == 50
    assert scene.pipeline.counts.policies["scene"].capped > 0
    assert scene.pipeline.memory()["scene"].shared_bytes == pytest.approx(cap_bytes)
    # What joins a frame that is there takes none.
    frame = min(scene.module.shared)
    process, page = next(place for place, at in scene.module.frame.items() if at == frame)
    scene.module.write(process, page, scene.module.content[process, page])
    scene.until(lambda: scene.module.frame[process, page] == frame)
    assert len(scene.module.shared) == 50
