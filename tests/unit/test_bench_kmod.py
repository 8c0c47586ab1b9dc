# SPDX-License-Identifier: MIT
"""What make bench-kmod makes of the tracer's output, and of its figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import figures, locks, table

TRACE = """\
# tracer: nop
 replay-9 [000] ..... 1.000000: mmap_lock_acquire_returned: mm=00a1 write=false success=true
 replay-9 [000] d..1. 1.000100: lock: (_raw_spin_lock+0x0) lock=0x10 caller=table+0x5c [mergemem]
 replay-9 [000] d..1. 1.000150: lock: (_raw_spin_lock+0x0) lock=0x20 caller=rmqueue+0x1/0x2
 replay-9 [000] d..1. 1.000160: unlock: (_raw_spin_unlock+0x0/0x30) lock=0x20
 replay-9 [000] d..1. 1.000400: unlock: (_raw_spin_unlock+0x0/0x30) lock=0x10
 replay-9 [000] ..... 1.001000: mmap_lock_acquire_returned: mm=00a1 write=false success=false
 replay-9 [000] ..... 1.002000: mmap_lock_released: mm=00a1 write=false
 replay-9 [000] d..1. 1.009000: unlock: (_raw_spin_unlock+0x0/0x30) lock=0x30
"""

GRAPH = """\
 0)               |  try_to_merge_two_pages() {
 0)   2.500 us    |    try_to_merge_with_ksm_page();
 0) + 12.500 us   |  } /* try_to_merge_two_pages */
 1)   3.500 us    |  try_to_merge_with_ksm_page();
 1)   2.000 us    |  stable_tree_append();
"""


def test_locks_are_paired_by_what_they_are(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text(TRACE)

    found = locks.read(trace)

    # No hold: the failed attempt, the lock of another kind, what was taken before the trace began.
    assert {kind: held.times for kind, held in found.items()} == {
        locks.MMAP_LOCK: 1,
        locks.TABLE_LOCK: 1,
    }
    assert found[locks.MMAP_LOCK].longest_us == pytest.approx(2000)
    assert found[locks.TABLE_LOCK].longest_us == pytest.approx(300)


def test_calls_count_once_and_without_the_tracer(tmp_path: Path) -> None:
    graph = tmp_path / "graph"
    graph.write_text(GRAPH)

    assert figures.outermost_us(graph) == pytest.approx((12.5 - 2) + (3.5 - 2))


def test_a_trace_of_nothing_is_no_figure(tmp_path: Path) -> None:
    graph = tmp_path / "graph"
    graph.write_text("# tracer: function_graph\n")

    with pytest.raises(ValueError, match="no call was traced"):
        figures.outermost_us(graph)


@pytest.mark.parametrize(
    ("target", "reached", "missed"),
    [
        (table.TARGETS[0], 0.05, 0.051),
        (table.TARGETS[1], 0.25, 0.26),
        (table.TARGETS[2], 8.0, 7.9),
        (table.TARGETS[3], 20.0, 20.1),
    ],
)
def test_targets(target: table.Target, reached: float, missed: float) -> None:
    assert target.reached(reached)
    assert not target.reached(missed)
