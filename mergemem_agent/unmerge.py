# SPDX-License-Identifier: MIT
"""`mergemem unmerge`: give processes private frames again in place of merged ones.

First everything is counted and held against the memory that there is; what would not fit is refused
before anything has changed. Then it goes process by process, and can be interrupted.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Final

from mergemem_agent.contract import PAGE_BYTES
from mergemem_agent.error import MergememError, ProcessGone
from mergemem_agent.headroom import shortages
from mergemem_agent.module import Module, ModuleFailure, NoSuchProcess
from mergemem_agent.procfs import Process, ProcFs
from mergemem_agent.status import STATUS_FILE, running_agent

INTERRUPTED_STATUS: Final = 130

# How often processes are gone through: one that is busy, or was forked meanwhile, gets its turn.
PASSES: Final = 5
PASS_SECONDS: Final = 0.5

# Addresses above belong to the kernel, though /proc/PID/maps lists a page of them.
_USER_END: Final = 1 << 63


@dataclass
class Holding:
    """What one process has to be given back."""

    process: Process
    start: int
    end: int
    pages: int = 0  # merged ones
    done: int = 0
    problem: str = ""


@dataclass
class Progress:
    """How far it got: told on stderr if that is a terminal, and at the end."""

    total: int
    done: int = 0
    interrupted: bool = False
    shown: float = field(default=0.0, repr=False)

    def add(self, pages: int) -> None:
        """Count pages, and show them now and then."""
        self.done += pages
        now = time.monotonic()
        if sys.stderr.isatty() and now - self.shown >= 0.2:
            self.shown = now
            part = self.done / max(1, self.total)
            print(f"\r{self.done} of {self.total} pages, {part:4.0%}", end="", file=sys.stderr)

    def finish(self) -> None:
        """Leave the line that shows progress."""
        if self.shown:
            print(f"\r{self.done} of {self.total} pages      ", file=sys.stderr)


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    given = _parse(arguments)
    with Module() as module:
        holdings = list(_holdings(given, ProcFs()))
        for holding in holdings:
            _count(module, holding, given.undumpable or given.all)
        _refuse_what_does_not_fit(holdings)
        _warn_of_agent()
        progress = Progress(sum(holding.pages for holding in holdings))
        before = signal.signal(signal.SIGINT, _interrupts(progress))
        try:
            holdings = _unmerge_all(module, holdings, progress, given)
        finally:
            signal.signal(signal.SIGINT, before)
        progress.finish()
        return _report(module, holdings, progress, given.all)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mergemem unmerge",
        description="Give processes private pages in place of all merged ones.",
        epilog="Refused, before anything changes, if memory would not suffice. Ctrl-C stops it; "
        "what is private by then stays so. Removing the kernel module needs no unmerge.",
    )
    parser.add_argument("pids", metavar="PID", type=int, nargs="*", help="a process")
    parser.add_argument("--all", action="store_true", help="every process of this host")
    parser.add_argument(
        "--range", type=_range, metavar="START-END",
        help="only these addresses of one process, in hexadecimal as in /proc/PID/maps",
    )  # fmt: skip
    parser.add_argument(
        "--undumpable", action="store_true",
        help="take processes that are not dumpable too; --all does",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    if bool(given.pids) == given.all:
        parser.error("name processes, or say --all")
    if given.range and len(given.pids) != 1:
        parser.error("--range is for one process: name its PID, and no other")
    return given


def _range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(?:0x)?([0-9a-fA-F]{1,16})-(?:0x)?([0-9a-fA-F]{1,16})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no range; write START-END in hexadecimal")
    start, end = (int(number, 16) for number in match.groups())
    if start >= end or end > _USER_END:
        raise argparse.ArgumentTypeError(f"{text!r} is not ascending, or beyond all memory")
    if start % PAGE_BYTES or end % PAGE_BYTES:
        raise argparse.ArgumentTypeError(f"{text!r} does not begin and end with a page, 0x1000")
    return start, end


def _interrupts(progress: Progress) -> Callable[[int, FrameType | None], None]:
    """Return a handler that lets the request in flight end; its answer is not lost then."""

    def handler(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        progress.interrupted = True

    return handler


# --- what is there to do -------------------------------------------------------------------------


def _holdings(given: argparse.Namespace, procfs: ProcFs) -> Iterator[Holding]:
    if given.all:
        yield from _everybody(procfs)
        return
    for pid in dict.fromkeys(given.pids):
        process = procfs.process(pid)
        if process is None:
            raise NoSuchProcess(f"there is no process {pid}")
        if process.kernel_thread:
            raise MergememError(f"{pid} is a kernel thread", hint="name processes with memory")
        start, end = given.range or _address_space(procfs, process)
        if start < end:
            yield Holding(process, start, end)


def _everybody(procfs: ProcFs) -> Iterator[Holding]:
    for identity in procfs.process_ids():
        process = procfs.process(identity.pid)
        if process is None or process.kernel_thread:
            continue
        try:
            start, end = _address_space(procfs, process)
        except ProcessGone:
            continue
        if start < end:
            yield Holding(process, start, end)


def _address_space(procfs: ProcFs, process: Process) -> tuple[int, int]:
    """Return where a process's mappings begin and end; equal: it has none."""
    mapped = [m for m in procfs.mappings(process.id.pid) if m.end <= _USER_END]
    return (mapped[0].start, mapped[-1].end) if mapped else (0, 0)


def _count(module: Module, holding: Holding, undumpable: bool) -> None:
    holding.pages, address = 0, holding.start
    try:
        while address < holding.end:
            found = module.unmerge(
                holding.process.id,
                address,
                (holding.end - address) // PAGE_BYTES,
                undumpable,
                count_only=True,
            )
            holding.pages += found.pages
            if found.next_address <= address:
                break
            address = found.next_address
    except NoSuchProcess:
        pass
    except ModuleFailure as failure:
        holding.problem = f"it could not be counted: {failure.message}"


def _refuse_what_does_not_fit(holdings: Sequence[Holding]) -> None:
    needs = [
        (holding.process.cgroup, holding.pages * PAGE_BYTES)
        for holding in holdings
        if holding.pages
    ]
    missing = shortages(needs)
    if missing:
        raise MergememError(
            "nothing was unmerged, as memory would not suffice:\n"
            + "\n".join(f"  {shortage}" for shortage in missing),
            hint="free some memory, raise the limit, or unmerge fewer processes at a time",
        )


def _warn_of_agent() -> None:
    pid = running_agent(STATUS_FILE)
    if pid is not None:
        print(
            f"mergemem: the agent, process {pid}, is running and will merge again what its "
            "policies tell it to; stop it first with 'systemctl stop mergemem', or change them",
            file=sys.stderr,
        )


# --- doing it ------------------------------------------------------------------------------------


def _unmerge_all(
    module: Module, holdings: list[Holding], progress: Progress, given: argparse.Namespace
) -> list[Holding]:
    """Go through the processes until none holds merged pages; return all that there were."""
    everybody = given.all
    undumpable = given.undumpable or everybody
    handled = {holding.process.id: holding for holding in holdings}
    for number in range(PASSES):
        for holding in holdings:
            if (holding.pages or holding.problem) and not progress.interrupted:
                _unmerge(module, holding, progress, undumpable)
        holdings = [holding for holding in holdings if holding.problem]
        if everybody and module.info().totals.shared_mappings:
            # Who was forked meanwhile holds what its parent had.
            holdings = [
                handled.get(holding.process.id, holding) for holding in _everybody(ProcFs())
            ]
            for holding in holdings:
                _count(module, holding, undumpable)
                handled[holding.process.id] = holding
        if progress.interrupted or not holdings:
            break
        if number < PASSES - 1:
            time.sleep(PASS_SECONDS)
    return list(handled.values())


def _unmerge(module: Module, holding: Holding, progress: Progress, undumpable: bool) -> None:
    address, holding.problem = holding.start, ""
    while address < holding.end and not progress.interrupted:
        pages = (holding.end - address) // PAGE_BYTES
        try:
            done = module.unmerge(holding.process.id, address, pages, undumpable)
        except NoSuchProcess:
            holding.pages = 0
            return
        except ModuleFailure as failure:
            if not progress.interrupted:  # else it is our own signal
                holding.problem = failure.message
            return
        holding.done += done.pages
        progress.add(done.pages)
        if done.next_address <= address:
            holding.problem = f"no progress at address {address:#x}"
            return
        address = done.next_address
    holding.pages = 0


# --- what came of it -----------------------------------------------------------------------------


def _report(
    module: Module, holdings: Sequence[Holding], progress: Progress, everybody: bool
) -> int:
    """Say what was done and what is left; return the exit status."""
    for holding in holdings:
        if holding.done or not everybody:
            print(f"process {holding.process.id.pid}: {holding.done} pages are private again")
    if progress.interrupted:
        print(
            f"mergemem: interrupted after {progress.done} of {progress.total} pages; these are "
            "private, the others are merged still",
            file=sys.stderr,
        )
        return INTERRUPTED_STATUS
    if everybody:
        return _report_totals(module, holdings)
    failed = [holding for holding in holdings if holding.problem]
    for holding in failed:
        print(f"mergemem: process {holding.process.id.pid}: {holding.problem}", file=sys.stderr)
    return 1 if failed else 0


def _report_totals(module: Module, holdings: Sequence[Holding]) -> int:
    totals = module.info().totals
    if not totals.shared_pages and not totals.shared_mappings:
        print("no page of this host is merged any more")
        return 0
    print(
        f"mergemem: {totals.shared_pages} merged pages with {totals.shared_mappings} mappings "
        "are left:",
        file=sys.stderr,
    )
    left = 0
    for holding in holdings:
        problem = holding.problem
        _count(module, holding, undumpable=True)
        left += holding.pages
        if holding.pages or holding.problem:
            why = problem or holding.problem or "it was merged again, or forked, meanwhile"
            print(
                f"  process {holding.process.id.pid}, {holding.process.executable or 'unknown'}: "
                f"{holding.pages} pages; {why}",
                file=sys.stderr,
            )
    if left < totals.shared_mappings:
        print(
            f"  {totals.shared_mappings - left} mappings of processes that came or went meanwhile, "
            "or that this user cannot see",
            file=sys.stderr,
        )
    if totals.shared_pages and not totals.shared_mappings:
        print("  nobody maps them: they are in use by I/O, and go with it", file=sys.stderr)
    print("run it again; 'mergemem status' tells whether any are left", file=sys.stderr)
    return 1
