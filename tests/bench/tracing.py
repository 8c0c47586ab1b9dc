# SPDX-License-Identifier: MIT
"""The kernel's own instruments, through tracefs: counting calls, timing functions and locks.

Source: Documentation/trace/ (ftrace.rst, kprobetrace.rst, histogram.rst).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/kernel/tracing")
BUFFER_KIB = 48 << 10


@contextmanager
def probe(name: str, definition: str) -> Iterator[Path]:
    """A kprobe event, as long as needed; its directory."""
    _append_probe(f"p:bench/{name} {definition}")
    try:
        yield ROOT / "events/bench" / name
    finally:
        _append_probe(f"-:bench/{name}")


@contextmanager
def counted(event: Path) -> Iterator[dict[int, int]]:
    """How often an event occurs, by pid; filled in at the end."""
    counts: dict[int, int] = {}
    (event / "trigger").write_text("hist:keys=common_pid:size=4096")
    try:
        yield counts
        text = (event / "hist").read_text()
        if dropped := re.search(r"Dropped: ([1-9]\d*)", text):
            raise RuntimeError(f"{event.name}: {dropped[1]} events were not counted")
        for pid, count in re.findall(r"common_pid:\s*(\d+)\s*}\s*hitcount:\s*(\d+)", text):
            counts[int(pid)] = int(count)
    finally:
        (event / "trigger").write_text("!hist:keys=common_pid:size=4096")


def traceable(names: Sequence[str]) -> list[str]:
    """Those of the functions that this kernel has as such: others were inlined."""
    found = {
        line.split()[0]
        for line in (ROOT / "available_filter_functions").read_text().splitlines()
        if line
    }
    # GCC calls a function whose arguments it changed NAME.isra.0 and the like.
    return [name for name in found if name.partition(".")[0] in names]


@contextmanager
def timed(names: Sequence[str], pid: int, output: Path) -> Iterator[None]:
    """The durations of calls that one process makes, as the function graph tracer writes them."""
    _write("set_ftrace_filter", "\n".join(names))
    _write("set_ftrace_pid", pid)
    with _recorded(output):
        _write("current_tracer", "function_graph")
        # An option of this tracer, hence not before: the end of a call has its name.
        _write("trace_options", "funcgraph-tail")
        yield
        _write("tracing_on", 0)


@contextmanager
def recorded(events: Sequence[Path], pid: int, output: Path) -> Iterator[None]:
    """Everything that events say of one process."""
    with _recorded(output):
        for event in events:
            (event / "filter").write_text(f"common_pid == {pid}")
            (event / "enable").write_text("1")
        try:
            yield
        finally:
            _write("tracing_on", 0)
            for event in events:
                (event / "enable").write_text("0")
                (event / "filter").write_text("0")


@contextmanager
def _recorded(output: Path) -> Iterator[None]:
    _write("trace", "")
    _write("buffer_size_kb", BUFFER_KIB)
    _write("tracing_on", 1)
    try:
        yield
        lost = sum(
            int(count)
            for path in ROOT.glob("per_cpu/cpu*/stats")
            for count in re.findall(r"overrun: (\d+)", path.read_text())
        )
        if lost:
            raise RuntimeError(f"{lost} events of the trace were lost")
        output.write_bytes((ROOT / "trace").read_bytes())
    finally:
        _write("current_tracer", "nop")
        _write("set_ftrace_filter", "")
        _write("set_ftrace_pid", "")
        _write("trace", "")
        _write("tracing_on", 1)


def _append_probe(line: str) -> None:
    # Not with mode "a": that seeks, which this file refuses.
    descriptor = os.open(ROOT / "kprobe_events", os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, f"{line}\n".encode("ascii"))
    finally:
        os.close(descriptor)


def _write(name: str, value: object) -> None:
    (ROOT / name).write_text(f"{value}\n")
