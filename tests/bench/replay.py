# SPDX-License-Identifier: MIT
"""Requests to the module, written down here and sent by replay.c, which measures them."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.kernel.actor import Region
from tests.kernel.contract import DEPTH_FULL_BYTES, Attribute, Command
from tests.kernel.wire import (
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    Socket,
    attribute,
    candidates_payload,
    message,
    processes,
)

SETTLE_SECONDS = 1.0
PROGRAM = Path(__file__).parents[2] / "build" / "replay"


@dataclass(frozen=True)
class Sent:
    """What the requests of one replay took, each."""

    cpu_ns: tuple[int, ...]
    wall_ns: tuple[int, ...]


class Requests:
    """Complete messages, in the order in which they are to be sent."""

    def __init__(self, family: int) -> None:
        self._family = family
        self._messages: list[bytes] = []

    def merge(self, regions: Sequence[Region], groups: int, step: int = 1) -> None:
        """Page n of every region is equal: every `step`th of them, so many groups a request."""
        pages = range(0, len(regions[0]), step)
        for first in range(0, len(pages), groups):
            chosen = pages[first : first + groups]
            self._add(Command.MERGE, _merge(regions, chosen))

    def merge_split(self, regions: Sequence[Region], groups: int, percent: int) -> None:
        """The same, with huge pages split where that share of them can be merged."""
        for first in range(0, len(regions[0]), groups):
            chosen = range(first, min(first + groups, len(regions[0])))
            payload = _merge(regions, chosen)
            payload += attribute(Attribute.SPLIT_PERCENT, percent.to_bytes(4, "little"))
            self._add(Command.MERGE, payload)

    def checksum(self, region: Region, depth: int = DEPTH_FULL_BYTES) -> None:
        """All pages of a region."""
        payload = _range(region) + attribute(Attribute.DEPTH, depth.to_bytes(4, "little"))
        self._add(Command.CHECKSUM, payload, NLM_F_DUMP)

    def unmerge(self, region: Region) -> None:
        """All pages of a region."""
        self._add(Command.UNMERGE, _range(region))

    def send(self, prepare: Callable[[int], None] | None = None) -> Sent:
        """Send them; `prepare` is told the pid of the sender before it begins."""
        with _program(self._messages) as program:
            assert program.stdout
            assert program.stdout.readline() == "ready\n"
            if prepare:
                prepare(program.pid)
            # What others have left to be done, in interrupts, is not to be ours.
            time.sleep(SETTLE_SECONDS)
            said, _ = program.communicate("go\n")
        lines = [[int(word) for word in line.split()] for line in said.splitlines()]
        if program.returncode or len(lines) != len(self._messages):
            raise RuntimeError(f"replay: status {program.returncode}, {len(lines)} answers")
        if errors := sorted({line[2] for line in lines} - {0}):
            raise RuntimeError(f"replay: requests failed with errno {errors}")
        return Sent(tuple(line[0] for line in lines), tuple(line[1] for line in lines))

    def _add(self, command: int, payload: bytes, flags: int = 0) -> None:
        header = bytes([command, 1, 0, 0])
        flags |= NLM_F_REQUEST | NLM_F_ACK
        self._messages.append(message(self._family, flags, header + payload))


def family() -> int:
    """The number of the module's family."""
    with Socket() as opened:
        return opened.family


def _merge(regions: Sequence[Region], chosen: Sequence[int]) -> bytes:
    """Groups of one page of each region, sorted by process and address, as the agent sends them."""
    keys = list(dict.fromkeys(region[0].process for region in regions))
    candidates = sorted(
        (keys.index(region[n].process), region[n].address, group)
        for region in regions
        for group, n in enumerate(chosen)
    )
    return candidates_payload(keys, [(at, process, group) for process, at, group in candidates])


def _range(region: Region) -> bytes:
    return (
        attribute(Attribute.PROCESSES, processes([region.actor.key]))
        + attribute(Attribute.ADDRESS, region.address.to_bytes(8, "little"))
        + attribute(Attribute.PAGES, region.pages.to_bytes(8, "little"))
    )


@contextmanager
def _program(messages: Sequence[bytes]) -> Iterator[subprocess.Popen[str]]:
    with tempfile.NamedTemporaryFile() as file:
        for data in messages:
            file.write(data + bytes(-len(data) % 4))
        file.flush()
        with subprocess.Popen(
            [PROGRAM, file.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as program:
            yield program
