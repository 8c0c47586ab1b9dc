# SPDX-License-Identifier: MIT
"""What the kernel tells of processes without being asked: hints and events, whoever collects them.

Neither is ever needed for a right result. A hint only moves a region in the scan queue, and an
event only has a process looked at in /proc sooner: losing all of them costs time.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from mergemem_agent.procfs import ProcessId


@dataclass(frozen=True)
class Hint:
    """What page faults tell of one region since the last hint about it.

    Many first touches are new memory: worth a scan once it has been quiet. Many write-protect
    faults mean that sharing has just broken: not worth one soon.
    """

    process: ProcessId
    address: int  # of the region: a multiple of 2 MiB
    first_touches: int
    write_protect_faults: int


@dataclass(frozen=True)
class ProcessEvents:
    """Which processes came, changed and went since the last time; by pid, since that is all.

    A pid may be in all three: it has ended, and another process has got it. With `complete` false
    some were lost, and only /proc can tell what they were.
    """

    forked: frozenset[int] = frozenset()
    executed: frozenset[int] = frozenset()
    ended: frozenset[int] = frozenset()  # processes that were watched; others end unnoticed
    complete: bool = True


class SourceKind(enum.Enum):
    """Where hints come from."""

    BPF = "bpf"  # tracepoints of page faults
    PERF = "perf"  # the software event of page faults: reads and writes are one to it
    PROC = "proc"  # there are none; processes are found in /proc


# Why a hint or an event did not arrive; all of them are in HintState.lost.
LOSSES: Final = ("evicted", "map_full", "gone", "missed", "events", "filter_full")


@dataclass(frozen=True)
class HintState:
    """How the source of hints is doing, for metrics. Counted since the agent started."""

    source: SourceKind = SourceKind.PROC
    sampling: int = 1  # one fault in so many is counted
    first_touches: int = 0
    write_protect_faults: int = 0
    events: int = 0  # forks, execs and exits
    lost: Mapping[str, int] = field(default_factory=dict)  # by reason
