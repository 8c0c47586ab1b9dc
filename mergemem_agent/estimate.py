# SPDX-License-Identifier: MIT
"""``mergemem estimate``: what merging would free, counted on any Linux host without the module.

selection of processes ─► census ─► report for people, or --json
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from mergemem_agent import census, fleet
from mergemem_agent.census import Census, Member
from mergemem_agent.error import MergememError
from mergemem_agent.gap import Limit, Unread
from mergemem_agent.policy import Policy, PolicySet, Selector
from mergemem_agent.policy_file import DEFAULT_ROOT, default_paths, load
from mergemem_agent.procfs import ProcFs
from mergemem_agent.quantity import QuantityError, format_size, parse_percent
from mergemem_agent.report import Estimate

_DESCRIPTION = """\
Count the equal pages of running processes, and tell what merging them would free. Needs no kernel
module, changes nothing, and stops nobody: memory is read in small steps, at the lowest priority.
Without --policy and --pid, the policies of the host choose the processes; where it has none, every
process is taken that can be read."""


def main(arguments: Sequence[str]) -> int:
    """Run ``mergemem estimate ARGUMENTS``; return the exit status. Raises MergememError."""
    options = _parser().parse_args(arguments)
    selection = _selection(options.pid, options.policy)
    lower_priority()
    started = time.monotonic()
    with ProgressBar(sys.stderr) as bar:
        result = census.take(
            selection,
            sample=options.sample / 100,
            allow_cross_uid=options.allow_cross_uid,
            progress=bar.update,
        )
    _refuse_empty(selection, result)
    processes = {member.process.id.pid: member.process for member in selection}
    estimate = Estimate(
        census=result,
        hints=tuple(fleet.hints(result, processes)),
        seconds=time.monotonic() - started,
    )
    if options.json:
        print(json.dumps(estimate.as_json(), indent=2))
    else:
        for line in estimate.report():
            print(line)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mergemem estimate", description=_DESCRIPTION)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--policy", action="append", type=Path, metavar="FILE", help="may be repeated"
    )
    chosen.add_argument(
        "--pid",
        nargs="+",
        action="extend",
        type=_pid,
        metavar="PID",
        help="these processes, by user and container as without a policy",
    )
    parser.add_argument(
        "--sample",
        type=_sample,
        default=100.0,
        metavar="PERCENT",
        help="count only so many of the contents, and extrapolate: for hosts with so much memory "
        "that 24 bytes for each page are too many (default: 100%%, exact)",
    )
    parser.add_argument(
        "--allow-cross-uid",
        action="store_true",
        help="count as if the module were loaded with allow_cross_uid=1",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    return parser


def _pid(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a process id")
    return int(text)


def _sample(text: str) -> float:
    try:
        percent = parse_percent(text)
    except QuantityError as error:
        raise argparse.ArgumentTypeError(f"{error}: write it as 10%") from None
    if not 0 < percent <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0%, up to 100%")
    return percent


# --- selection -----------------------------------------------------------------------------------


def _selection(pids: Sequence[int] | None, paths: Sequence[Path] | None) -> list[Member]:
    if pids:
        return census.members(pids)
    paths = paths or default_paths()
    everything = PolicySet(policies=(Policy(name="everything", select=Selector()),))
    return select(load(paths) if paths else everything, ProcFs())


def select(policies: PolicySet, proc: ProcFs) -> list[Member]:
    """Return the processes that the policies choose now, but for this one.

    Raises MergememError if there are none.
    """
    found = []
    for identity in proc.process_ids():
        process = proc.process(identity.pid)
        if process is None or identity.pid == os.getpid():
            continue
        policy = policies.match(process)
        if policy is not None:
            domain = policy.domain_of(process)
            found.append(Member(process, domain, policy.include_undumpable))
    if not found:
        raise MergememError(
            "the policies choose none of the processes that run now",
            f"see 'mergemem policy explain PID', and {DEFAULT_ROOT} for the policies of the host",
        )
    return found


def _refuse_empty(selection: Sequence[Member], result: Census) -> None:
    """Raise rather than report zeros where nothing could be looked at."""
    left_out = {gap.pid: gap.reason for gap in result.gaps if gap.pages == 0}
    if len(left_out) == len(selection):
        reasons = sorted({reason.value for reason in left_out.values()})
        denied = Unread.DENIED in left_out.values()
        needs = Limit.PROCESSES.needs
        raise MergememError(
            f"none of the {len(selection)} processes could be read: {', '.join(reasons)}",
            f"run as root with {needs}; a process with more capabilities than this one, or under "
            "a security module, may be out of reach even so"
            if denied
            else "",
        )


def lower_priority() -> None:
    """Let everybody else go first, for good.

    Not SCHED_IDLE, nor idle I/O: whoever is starved while it holds a process's mmap_lock, if only
    for the microseconds of one page, makes that process wait as long.
    """
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class ProgressBar:
    """One line on a terminal; silent where there is none."""

    _WIDTH = 30
    _INTERVAL_SECONDS = 0.1

    def __init__(self, stream: TextIO) -> None:
        """Draw nothing yet."""
        self._stream = stream
        self._shown = stream.isatty()
        self._next_seconds = 0.0

    def update(self, done_bytes: int, total_bytes: int) -> None:
        """Draw, unless that was done a moment ago."""
        now = time.monotonic()
        if self._shown and now >= self._next_seconds:
            self._next_seconds = now + self._INTERVAL_SECONDS
            self._stream.write("\r\x1b[K" + self.line(done_bytes, total_bytes))
            self._stream.flush()

    def line(self, done_bytes: int, total_bytes: int) -> str:
        """Return the bar as text. The total is an estimate, so `done` may exceed it."""
        part = min(1.0, done_bytes / max(1, total_bytes))
        bar = "#" * round(part * self._WIDTH)
        done, total = format_size(done_bytes), format_size(max(done_bytes, total_bytes))
        return f"reading [{bar:.<{self._WIDTH}}] {part:4.0%}  {done} of {total}"

    def __enter__(self) -> Self:
        """Use as a context manager."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Wipe the line."""
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
