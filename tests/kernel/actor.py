# SPDX-License-Identifier: MIT
"""Processes whose memory a test controls to the byte: the driver of actor.c.

>>> with Stage() as stage:
...     alice, bob = stage.start(), stage.start()
...     mine, yours = alice.region(10, seed=1), bob.region(10, seed=1)
...     child = alice.fork()
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tests.kernel import frames

PAGE_BYTES = 4096
PROGRAM = Path(__file__).parents[2] / "build" / "actor"
# Generous: the guest may be emulated, and the host busy.
ANSWER_SECONDS = 240

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MADV_DONTNEED, MADV_FREE, MADV_MERGEABLE, MADV_DONTDUMP, MADV_WIPEONFORK = 4, 8, 12, 16, 18
MADV_PAGEOUT = 21


class ActorError(Exception):
    """The actor said "error"."""


class ProcessKey(NamedTuple):
    """A process beyond doubt: its pid, and field 22 of its stat."""

    pid: int
    start_time_ticks: int


class Page(NamedTuple):
    """One page of a process that is, or was, an actor."""

    process: ProcessKey
    address: int

    @property
    def frame(self) -> int:
        """The number of its page frame; 0 when none is mapped."""
        return int(frames.of(self.process.pid, self.address, 1)[0])


def start_time_ticks(pid: int) -> int:
    """Field 22 of /proc/PID/stat. The command's name may hold anything, even ") "."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def content(seed: int, page: int) -> bytes:
    """The bytes of a page that an actor filled; `content_word` in actor.h is the same function."""
    with np.errstate(over="ignore"):
        start = seed * 0x9E3779B97F4A7C15 + page * 0xD1B54A32D192ED03
        x = np.uint64(start % (1 << 64)) + np.arange(PAGE_BYTES // 8, dtype=np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return bytes((x ^ (x >> np.uint64(31))).tobytes())


@dataclass(frozen=True)
class Region:
    """Pages of an actor, filled with a content; page n equals page n % period if there is one."""

    actor: Actor
    address: int
    pages: int
    seed: int
    period: int = 0

    def __getitem__(self, index: int) -> Page:
        if not 0 <= index < self.pages:
            raise IndexError(index)
        return Page(self.actor.key, self.address + index * PAGE_BYTES)

    def __iter__(self) -> Iterator[Page]:
        return (self[index] for index in range(self.pages))

    def __len__(self) -> int:
        return self.pages

    @property
    def frames(self) -> npt.NDArray[np.uint64]:
        """The frame number of each page; 0 where none is mapped."""
        return frames.of(self.actor.pid, self.address, self.pages)

    def of(self, actor: Actor) -> Region:
        """The same memory in another process, such as a child."""
        return replace(self, actor=actor)

    def at(self, address: int) -> Region:
        """The same content at another place, such as after mremap."""
        return replace(self, address=address)

    def verify(self) -> None:
        """Every byte is what it was filled with."""
        said = self.actor.ask("verify", self.address, self.pages, self.seed, self.period)
        assert said == "same", f"actor {self.actor.pid}: {said}"

    def write(self, index: int, byte: int) -> None:
        """The first byte of a page."""
        self.actor.ask("write", self[index].address, byte)

    def read(self, index: int) -> int:
        """The first byte of a page."""
        return int(self.actor.ask("read", self[index].address))

    def original(self, index: int) -> int:
        """What the first byte of a page was filled with."""
        return content(self.seed, index % self.period if self.period else index)[0]


class Actor:
    """One process, and the socket over which it takes commands."""

    def __init__(self, stage: Stage, pid: int, channel: socket.socket) -> None:
        self.stage = stage
        self.pid = pid
        self.key = ProcessKey(pid, start_time_ticks(pid))
        self._channel = channel
        self._lines = channel.makefile("r")

    def ask(self, *words: object) -> str:
        """Give a command; its answer without the "ok". ActorError when it could not."""
        self._channel.sendall((" ".join(map(str, words)) + "\n").encode())
        verdict, _, rest = self._lines.readline().rstrip("\n").partition(" ")
        if verdict != "ok":
            raise ActorError(f"{' '.join(map(str, words))}: {verdict} {rest}")
        return rest.strip()

    def map(self, pages: int, kind: str = "private", path: Path | None = None) -> int:
        """A mapping of its own, see do_map; the address."""
        return int(self.ask("map", pages, kind, *([path] if path else [])))

    def region(self, pages: int, seed: int, period: int = 0, kind: str = "private") -> Region:
        """A new mapping, filled."""
        region = Region(self, self.map(pages, kind), pages, seed, period)
        self.ask("fill", region.address, pages, seed, period)
        return region

    def fork(self) -> Actor:
        """A child, with a channel of its own."""
        return self.stage.accept(int(self.ask("fork")))

    def exec(self) -> Actor:
        """The same process after exec; use the new one from here on."""
        self._channel.sendall(b"exec\n")
        self.close_channel()
        return self.stage.accept(self.pid)

    def exit(self) -> None:
        """End by itself, and wait until nothing of it is left."""
        self._channel.sendall(b"exit 0\n")
        self.wait()

    def ask_to_crash(self) -> None:
        """Die with a core dump, and wait for both."""
        self._channel.sendall(b"crash\n")
        self.wait()

    def wait(self) -> None:
        """Wait for its end; its memory has been torn down then."""
        self.stage.reap(self)

    def close_channel(self) -> None:
        """Our end; the actor takes that for a command to go."""
        self._lines.close()
        self._channel.close()

    def status(self, field: str) -> int:
        """A field of /proc/PID/status, such as RssAnon, in pages."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024 // PAGE_BYTES
        raise KeyError(field)

    def minor_faults(self) -> int:
        """How many page faults it has taken so far that needed no I/O."""
        stat = Path(f"/proc/{self.pid}/stat").read_text()
        return int(stat.rpartition(")")[2].split()[7])


class Stage:
    """Where actors come from, and where all of them end."""

    def __init__(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._name = f"mergemem-stage-{os.getpid()}-{id(self):x}"
        self._listener.bind(f"\0{self._name}")
        self._listener.listen(64)
        self._listener.settimeout(ANSWER_SECONDS)
        self._started: dict[int, subprocess.Popen[bytes]] = {}
        self._waiting: dict[int, socket.socket] = {}
        self.actors: list[Actor] = []

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self, uid: int | None = None) -> Actor:
        """A fresh process, of a user."""
        program = subprocess.Popen([PROGRAM, self._name], user=uid)
        self._started[program.pid] = program
        return self.accept(program.pid)

    def accept(self, pid: int) -> Actor:
        """The actor of that pid, as soon as it has connected."""
        while pid not in self._waiting:
            channel, _ = self._listener.accept()
            channel.settimeout(ANSWER_SECONDS)
            credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            hello = b""
            while not hello.endswith(b"\n"):
                hello += channel.recv(1)
            caller = struct.unpack("iII", credentials)[0]
            assert hello == f"hello {caller}\n".encode()
            self._waiting[caller] = channel
        actor = Actor(self, pid, self._waiting.pop(pid))
        self.actors.append(actor)
        return actor

    def reap(self, actor: Actor) -> None:
        """Wait until a process, ours or the child of one of ours, has gone."""
        if actor in self.actors:
            self.actors.remove(actor)
        if program := self._started.pop(actor.pid, None):
            program.wait(ANSWER_SECONDS)
            return
        # Its parent ignores SIGCHLD, so it vanishes by itself, after its memory.
        try:
            descriptor = os.pidfd_open(actor.pid)
        except OSError as failure:
            # EINVAL: its last moment, when it is no process any more and its pid still there.
            if failure.errno not in (errno.ESRCH, errno.EINVAL):
                raise
            return
        try:
            ended, _, _ = select.select([descriptor], [], [], ANSWER_SECONDS)
        finally:
            os.close(descriptor)
        assert ended, f"actor {actor.pid} does not end"

    def close(self) -> None:
        """End every actor, the youngest first."""
        for actor in reversed(self.actors.copy()):
            actor.close_channel()
            self.reap(actor)
        for program in self._started.values():
            program.kill()
            program.wait()
        self._started.clear()
        self._listener.close()
