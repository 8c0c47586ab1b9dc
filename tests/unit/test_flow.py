# SPDX-License-Identifier: MIT
"""Conservation: whatever happens, what came into a stage is what left it and what is there."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mergemem_agent.budget import Budget
from mergemem_agent.contract import Result
from mergemem_agent.hint import Hint
from mergemem_agent.policy import PolicySet
from mergemem_agent.procfs import ProcessId
from mergemem_agent.region import REGION_BYTES, REGION_PAGES
from mergemem_agent.window import DOUBT_SECONDS
from mergemem_agent.word import Stage, stage_of
from tests.unit.synthetic import FIRST_ADDRESS, SAME_SAMPLE, Host, policy

Array = np.ndarray[Any, np.dtype[Any]]
PAGES = 2 * REGION_PAGES - 100

# Contents of few kinds, so that many are equal; some look equal by their samples only.
CONTENTS = np.array([*range(1, 200), *(SAME_SAMPLE + n for n in range(1, 100)), 0], dtype=np.uint64)


class History:
    """A host, a pipeline over it, and things that happen to both."""

    def __init__(self) -> None:
        self.host = Host()
        self.random = np.random.default_rng(5)
        self.hints: list[Hint] = []
        self.hinted = 0
        self.pipeline = self.host.pipeline()
        self.pipeline._hints = self._take_hints
        for _ in range(3):
            self.start()

    def _take_hints(self) -> list[Hint]:
        hints, self.hints = self.hints, []
        self.hinted += len(hints)
        return hints

    def start(self) -> None:
        pid = max(self.host.memories, default=100) + 1
        self.host.start(pid, self.contents(PAGES))

    def contents(self, pages: int) -> Array:
        return self.random.choice(CONTENTS, pages)

    def any_pid(self) -> int:
        return int(self.random.choice(list(self.host.memories)))

    def end(self) -> None:
        if len(self.host.memories) > 1:
            self.host.end(self.any_pid())

    def write(self) -> None:
        pages = np.unique(self.random.integers(PAGES, size=300))
        self.host.write(self.any_pid(), pages, self.contents(len(pages)))

    def hint(self) -> None:
        address = FIRST_ADDRESS + int(self.random.integers(4)) * REGION_BYTES
        first, broken = self.random.integers(3, size=2).tolist()
        process = self.host.id(self.any_pid()) if first else ProcessId(1, 1)
        self.hints.append(Hint(process, address, first, broken))

    def refuse(self) -> None:
        results = [None, Result.NOTEQUAL, Result.PINNED, Result.MOREMAP]
        self.host.refused = results[int(self.random.integers(len(results)))]

    def change_policies(self) -> None:
        (only,) = policy().policies
        only = replace(only, zero_pages=not self.pipeline.targets.policies.policies[0].zero_pages)
        self.pipeline.change_policies(PolicySet(policies=(only,)), Budget(100.0, {}))

    def lose_module(self) -> None:
        self.pipeline.forget_pages()

    def round(self) -> None:
        self.pipeline._synced = -float("inf")
        self.host.round(self.pipeline)

    def all_due(self) -> None:
        """As if half an hour had passed: as little as what promises nothing waits at most."""
        self.pipeline.queue._idle_until = 0.0
        for target in self.pipeline.targets:
            target.regions.rows["sample"] = 0.0
            target.regions.rows["doubted"] -= DOUBT_SECONDS / 8
            target.regions.schedule(time.monotonic(), 0.0)

    def held(self) -> Counter[Stage]:
        """Count the pages in each stage, word by word."""
        counts: Counter[Stage] = Counter()
        for target in self.pipeline.targets:
            for row in range(len(target.regions.words)):
                stages = stage_of(target.regions.words_of(row)).tolist()
                counts.update(Stage(stage) for stage in stages)
        return counts

    def check(self) -> None:
        self.pipeline._synced = -float("inf")
        self.pipeline.find_targets()
        for target in self.pipeline.targets:
            self.pipeline.counts.flow.take(target.regions)
        flow = self.pipeline.counts.flow
        held = self.held()
        assert {stage: flow.held(stage) for stage in Stage if stage} == {
            stage: held[stage] for stage in Stage if stage
        }
        # What is held at all is what ever came and did not go.
        assert flow.held(Stage.ABSENT) == -sum(held.values())
        assert sum(self.pipeline.queue.state().hints.values()) == self.hinted
        results = self.pipeline.counts.results.total()
        assert results == self.pipeline.counts.nominated.total()


STEPS: dict[str, Callable[[History], None]] = {
    "round": History.round,
    "write": History.write,
    "start": History.start,
    "end": History.end,
    "hint": History.hint,
    "refuse": History.refuse,
    "all due": History.all_due,
    "policies": History.change_policies,
    "module": History.lose_module,
}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.sampled_from([*STEPS, *["round"] * 8, "write", "write", "all due", "all due"]),
        min_size=5,
        max_size=30,
    )
)
# A page that was dismissed, and one that had settled, become equal to others beside their samples.
@example(
    ["round", "end", "end", "hint", "round", "start", "refuse", "write", "end", "hint", "write"]
)
@example(
    [
        "round",
        "refuse",
        "end",
        "round",
        "end",
        "round",
        "hint",
        "start",
        "write",
        "end",
        "hint",
        "write",
    ]
)
def test_no_page_is_lost_on_the_way(steps: list[str]) -> None:
    history = History()
    for step in steps:
        STEPS[step](history)
        history.check()
    # And at the end all comes to rest: every page that has an equal one is merged.
    history.host.refused = None
    for _ in range(16):
        history.all_due()
        history.round()
    history.check()
    contents = np.concatenate([memory.contents for memory in history.host.memories.values()])
    merged = np.concatenate([memory.merged for memory in history.host.memories.values()])
    values, counts = np.unique(contents, return_counts=True)
    equal = np.isin(contents, values[counts > 1]) & (contents != 0)
    assert merged[equal].all()
