# SPDX-License-Identifier: MIT
"""What hints cost a storm of page faults, inside the guest: with them and without, in turn.

    python -m tests.bench.hints_guest DIRECTORY

Started by hints.py, which makes figures of the facts that this leaves in the directory. Three
cases: nothing attached; a BPF program that does nothing, which is the floor of any that counts
faults; and the hints as the agent has them, at the sampling that it chooses by itself.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergemem_agent.hint import SourceKind
from mergemem_agent.hint_program import FAULT_TRACEPOINTS, HintProgram
from mergemem_agent.hint_source import BpfHints
from mergemem_agent.procfs import ProcessId, ProcFs
from tests.vm.cache import BUILD

STORM = BUILD / "hints_storm"
PAGES = 8192
ROUNDS_EACH = 6  # in one go
TURNS = 7  # of all cases
EMPTY = b"int empty(void *ctx) { return 0; }"
KINDS = ("touch", "cow")


class Storm:
    """The program that takes faults, when it is told."""

    def __init__(self, kind: str) -> None:
        words = [str(STORM), kind, str(PAGES), str(ROUNDS_EACH)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout
        assert self._process.stdout.readline() == b"ready\n"
        process = ProcFs().process(self._process.pid)
        assert process
        self.id: ProcessId = process.id

    def run(self, meanwhile: Callable[[], object]) -> list[int]:
        """CPU time of each round, in nanoseconds; `meanwhile` is called now and then."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin
        assert stdout
        stdin.write(b"\n")
        stdin.flush()
        while not select.select([stdout], [], [], 0.25)[0]:
            meanwhile()
        return [int(word) for word in stdout.readline().split()]

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


class Bench:
    """Both programs, loaded, and at most one of them attached."""

    def __init__(self) -> None:
        from bcc import BPF

        self._empty = BPF(text=EMPTY, cflags=["-w"])
        self.program = HintProgram()
        self.source: BpfHints | None = None

    @contextmanager
    def nothing(self, _: ProcessId) -> Iterator[Callable[[], object]]:
        """No program, or the fault's way past where it would be."""
        yield lambda: None

    @contextmanager
    def empty(self, _: ProcessId) -> Iterator[Callable[[], object]]:
        """A program that does nothing."""
        for tracepoint in FAULT_TRACEPOINTS:
            self._empty.attach_raw_tracepoint(tp=tracepoint, fn_name=b"empty")
        yield lambda: None
        for tracepoint in FAULT_TRACEPOINTS:
            self._empty.detach_raw_tracepoint(tp=tracepoint)

    @contextmanager
    def hints(self, process: ProcessId) -> Iterator[Callable[[], object]]:
        """As the agent has them; the sampling goes on from where it was."""
        self.program.count_faults(SourceKind.BPF)
        if self.source is None:
            self.source = BpfHints(self.program)
        source = self.source
        source.hints([process])
        yield lambda: source.hints([process])
        self.program.stop_counting()

    def turn(self, number: int) -> dict[str, Any]:
        """All cases once, for both kinds, in an order that changes."""
        cases = [self.nothing, self.empty, self.hints]
        cases = cases[number % 3 :] + cases[: number % 3]
        facts: dict[str, Any] = {}
        for kind in KINDS:
            storm = Storm(kind)
            facts[kind] = {}
            for case in cases:
                with case(storm.id) as meanwhile:
                    facts[kind][case.__name__] = storm.run(meanwhile)
            storm.end()
        assert self.source
        facts["sampling"] = self.source.sampling
        return facts


def main() -> int:
    bench = Bench()
    turns = []
    for number in range(TURNS):
        turns.append(bench.turn(number))
        print(turns[-1], flush=True)
    assert bench.source
    state = bench.source.state()
    facts = {"turns": turns, "pages": PAGES, "lost": dict(state.lost)}
    facts["told"] = state.first_touches + state.write_protect_faults
    Path(sys.argv[1], "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
