# SPDX-License-Identifier: MIT
"""Everything at once, on four processors.

Several clients merge, unmerge and checksum the same processes (clients.c), which meanwhile do all
that core mm allows (actor_storm.h): fork, exec, exit, munmap, mremap, mprotect, MADV_DONTNEED,
MADV_FREE, huge pages made and split, swap; under compaction, and with the module unloaded and
loaded again in the middle. The processes compare every byte with a shadow.

Duration: MERGEMEM_CONCURRENCY_SECONDS; seed of the clients: MERGEMEM_SEED.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel import race, turmoil
from tests.kernel.accounting import settled_free_pages
from tests.kernel.actor import PROGRAM, Actor, Stage
from tests.kernel.contract import Command, Result
from tests.kernel.module import Module

SECONDS = float(os.environ.get("MERGEMEM_CONCURRENCY_SECONDS", "20"))
SEED = int(os.environ.get("MERGEMEM_SEED", "1"))
CLIENTS = PROGRAM.with_name("clients")
CLIENT_THREADS = 4
VICTIMS, VICTIM_THREADS = 3, 2
# Two huge pages for each thread.
PAGES = VICTIM_THREADS * 1024
# Page tables, slabs and per-CPU lists of the kernel, which it returns when it needs to.
SLACK_PAGES = 4096
DELETE_MODULE = 176
WANTED = {Result.SUCCESS, Result.ZEROED, Result.NOTEQUAL, Result.HUGE}
# Malformed requests, answers that do not fit, faults.
UNEXPECTED = (errno.EINVAL, errno.ERANGE, errno.EMSGSIZE, errno.EFAULT)


class Crowd:
    """The victims, and what happens to them and to the module from outside."""

    def __init__(self, stage: Stage, module: Module) -> None:
        self.happened: Counter[str] = Counter()
        self._stage = stage
        self._module = module
        self._chance = random.Random(SEED)
        self._to_do: list[Callable[[], None]] = []
        self._victims = [self._begin(stage.start()) for _ in range(VICTIMS)]

    def _begin(self, actor: Actor) -> Actor:
        address = actor.map(PAGES, "huge")
        seed = self._chance.randrange(1, 1 << 20)
        actor.ask("storm", address, PAGES, seed, VICTIM_THREADS)
        return actor

    def disturb(self) -> None:
        """One event; each has its turn."""
        if not self._to_do:
            self._to_do = [self._compact, self._exec, self._exit, self._reload]
            self._chance.shuffle(self._to_do)
        act = self._to_do.pop()
        act()
        self.happened[act.__name__.strip("_")] += 1

    def end(self) -> int:
        """Stop the storms: nothing may have been wrong; the number of their rounds."""
        total = 0
        for victim in self._victims:
            rounds, *wrong = victim.ask("stop_storm").split(" ", 1)
            assert not wrong, wrong
            total += int(rounds)
            victim.exit()
        return total

    def _compact(self) -> None:
        Path("/proc/sys/vm/compact_memory").write_text("1")

    def _pick(self) -> tuple[int, Actor]:
        index = self._chance.randrange(len(self._victims))
        wrong = self._victims[index].ask("storm_so_far")
        assert not wrong, wrong
        return index, self._victims[index]

    def _exec(self) -> None:
        index, victim = self._pick()
        self._victims[index] = self._begin(victim.exec())

    def _exit(self) -> None:
        index, victim = self._pick()
        self._victims[index] = self._begin(self._stage.start())
        victim.exit()

    def _reload(self) -> None:
        """As an administrator would: again and again while somebody is in the middle of a dump."""
        delete_module = ctypes.CDLL(None).syscall
        while delete_module(DELETE_MODULE, b"mergemem", os.O_NONBLOCK):
            time.sleep(0.001)
        self._module.load()


@pytest.fixture
def busy_host(tmp_path: Path) -> Iterator[None]:
    """All processors, huge pages, a swap device."""
    with (
        turmoil.all_processors() as count,
        turmoil.huge_pages(),
        turmoil.swap_device(tmp_path),
    ):
        assert count >= 4, f"this test needs four processors, and the guest has {count}"
        yield


class Clients:
    """The program that has several clients in it, and what became of their requests so far."""

    def __init__(self, program: subprocess.Popen[str]) -> None:
        self._program = program

    def report(self) -> dict[str, Any]:
        """What it tells when it is asked; a failed assertion if anything was wrong."""
        assert self._program.stdin
        assert self._program.stdout
        with contextlib.suppress(BrokenPipeError):
            self._program.stdin.write("\n")
            self._program.stdin.flush()
        return self._parsed(self._program.stdout.readline())

    def end(self) -> dict[str, Any]:
        """Stop them; the last report."""
        said, _ = self._program.communicate()
        assert self._program.returncode == 0, said
        return self._parsed(said)

    def _parsed(self, said: str) -> dict[str, Any]:
        assert said.startswith("{"), said
        report: dict[str, Any] = json.loads(said)
        for name, numbered in (("asked", Command), ("results", Result)):
            report[name] = {numbered(n): count for n, count in enumerate(report[name]) if count}
        report["errors"] = {os.strerror(n): count for n, count in enumerate(report["errors"])}
        report["errors"] = {text: count for text, count in report["errors"].items() if count}
        return report


def has_everything(report: dict[str, Any]) -> bool:
    """Whether each command was asked for, and the results were met that make it a test."""
    asked, results = set(report["asked"]), set(report["results"])
    return asked == set(Command) and results >= WANTED and bool(report["unmerged"])


def took_place(names: list[str], since: Counter[str]) -> bool:
    """Whether the kernel has counted each of these events since then."""
    now = turmoil.events()
    return all(now[name] > since[name] for name in names)


@pytest.mark.usefixtures("busy_host")
def test_everything_at_once(stage: Stage, module: Module) -> None:
    free_before = settled_free_pages()
    events = Counter(turmoil.events())
    crowd = Crowd(stage, module)
    # What the kernel counts: huge pages made, split and made again, swap both ways, compaction.
    proof = ["thp_fault_alloc", "thp_split_pmd", "thp_collapse_alloc"]
    proof += ["pswpout", "pswpin", "pgmigrate_success"]
    words = [str(CLIENTS), str(PROGRAM), str(CLIENT_THREADS), str(SEED)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        clients = Clients(program)

        def met() -> bool:
            return took_place(proof, events) and has_everything(clients.report())

        def told() -> object:
            return Counter(turmoil.events()) - events, clients.report()

        # For the time that is given, and until all of it has taken place, or it was no test.
        for _ in race.rounds(SECONDS, met, told):
            assert program.poll() is None, clients.report()
            for _ in range(4):
                crowd.disturb()
        report = clients.end()
    rounds = crowd.end()

    events = Counter(turmoil.events()) - events
    print(f"{rounds} rounds, {dict(crowd.happened)}, { ({name: events[name] for name in proof}) }")
    print(report)
    assert has_everything(report)
    assert not {os.strerror(number) for number in UNEXPECTED} & report["errors"].keys()
    # `scene` asks for the totals. Nothing else may be left either.
    assert abs(settled_free_pages() - free_before) < SLACK_PAGES
