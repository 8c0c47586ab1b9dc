# SPDX-License-Identifier: MIT
"""`mergemem merge PID...` and `mergemem unmerge PID...`: once, now, without agent or policy."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from mergemem_agent.contract import PAGE_BYTES, Result
from mergemem_agent.error import MergememError
from mergemem_agent.index import nominate
from mergemem_agent.merge import freed_frames, requests
from mergemem_agent.module import Limits, Module, NoSuchProcess
from mergemem_agent.policy import DomainKind, Policy, Selector
from mergemem_agent.procfs import Process, ProcFs
from mergemem_agent.region import REGION_PAGES, REGION_SHIFT
from mergemem_agent.scan import SLICE_REGIONS, Slice, look, region_numbers
from mergemem_agent.targets import Target

Array = np.ndarray[Any, np.dtype[Any]]

MEANING: Final = {
    Result.SUCCESS: "merged",
    Result.NOTASK1: "the process is gone",
    Result.NOTASK2: "the process is gone",
    Result.NOPAGE1: "the page is gone, or swapped",
    Result.NOPAGE2: "the page is gone, or swapped",
    Result.ALREADYSH: "shared already",
    Result.MOREMAP: "the shared page has as many mappings as it may have; run again",
    Result.NOTEQUAL: "the page has changed",
    Result.BUSY: "in a transition; run again",
    Result.PINNED: "in use by I/O",
    Result.REFUSED: "of a kind that is never merged",
    Result.DOMAIN: "belongs to another user than its group",
    Result.NOMEM: "no memory for a shared page, or max_shared_bytes is reached",
    Result.HUGE: "part of a huge page",
    Result.ALONE: "fine, but no other page of its group was",
}


def main(arguments: Sequence[str]) -> int:
    """Run `merge` or `unmerge`, which the first argument says."""
    command, *rest = arguments
    given = _parser(command).parse_args(rest)
    with Module() as module:
        processes = [_process(pid) for pid in dict.fromkeys(given.pids)]
        if command == "merge":
            return _merge(module, processes, DomainKind(given.domain), given.undumpable)
        return _unmerge(module, processes, given.undumpable)


def _parser(command: str) -> argparse.ArgumentParser:
    sentence = {
        "merge": "Merge equal anonymous pages of the named processes, once.",
        "unmerge": "Give the named processes private pages in place of all merged ones.",
    }[command]
    parser = argparse.ArgumentParser(prog=f"mergemem {command}", description=sentence)
    parser.add_argument("pids", metavar="PID", type=int, nargs="+", help="a process")
    parser.add_argument(
        "--undumpable", action="store_true", help="take processes that are not dumpable too"
    )
    if command == "merge":
        parser.add_argument(
            "--domain",
            choices=[kind.value for kind in DomainKind],
            default=DomainKind.USER_AND_CGROUP.value,
            help="who may share pages with whom; policy, host: all; default: %(default)s",
        )
    return parser


def _process(pid: int) -> Process:
    process = ProcFs().process(pid)
    if process is None:
        raise NoSuchProcess(f"there is no process {pid}")
    if process.kernel_thread:
        raise MergememError(f"{pid} is a kernel thread", hint="name processes with memory")
    return process


# --- merge -----------------------------------------------------------------------------------


def _merge(module: Module, processes: Sequence[Process], kind: DomainKind, undumpable: bool) -> int:
    policy = Policy(
        name="merge",
        select=Selector(),
        domain=kind,
        settle_seconds=0,
        include_undumpable=undumpable,
    )
    limits = module.info().limits
    targets = [
        Target(process.id, policy, policy.domain_of(process), process.anonymous_bytes)
        for process in processes
    ]
    for target in targets:
        _scan(module, target, limits)
    results: Counter[Result] = Counter()
    freed = 0
    for domain in dict.fromkeys(target.domain for target in targets):
        members = [target for target in targets if target.domain == domain]
        for result, frames in _merge_domain(module, members, limits):
            results.update(result)
            freed += frames
    _report(targets, results, freed)
    return 0


def _scan(module: Module, target: Target, limits: Limits) -> None:
    """Look once at all memory of a process."""
    target.regions.replace(region_numbers(ProcFs().mappings(target.process.pid)))
    numbers = target.regions.rows["number"]
    first = 0
    while first < len(numbers):
        count = 1
        while (
            count < SLICE_REGIONS
            and first + count < len(numbers)
            and numbers[first + count] == numbers[first] + np.uint64(count)
        ):
            count += 1
        look(module, Slice(target, first, count), limits.max_mappings)
        first += count
    target.regions.settle()


def _merge_domain(
    module: Module, targets: Sequence[Target], limits: Limits
) -> Iterator[tuple[list[Result], int]]:
    for nominated in nominate([target.regions for target in targets]):
        for request in requests(nominated, limits.max_candidates, limits.max_processes):
            named = [targets[index].process for index in request.processes]
            allowed = named if targets[0].policy.include_undumpable else ()
            results = module.merge(named, request.candidates, allowed)
            yield [Result(code) for code in results.tolist()], freed_frames(request, results)


def _report(targets: Sequence[Target], results: Counter[Result], freed: int) -> None:
    pages = sum(target.regions.pages for target in targets)
    domains = len({target.domain for target in targets})
    print(
        f"{pages} pages of {len(targets)} processes in {domains} "
        f"domain{'s' if domains > 1 else ''}, {results.total()} nominated"
    )
    for result in Result:
        if results[result]:
            print(f"  {result.name.lower():<10} {results[result]:>10}  {MEANING[result]}")
    print(f"freed {freed} pages, {freed * PAGE_BYTES / 2**20:.1f} MiB")


# --- unmerge ---------------------------------------------------------------------------------


def _unmerge(module: Module, processes: Sequence[Process], undumpable: bool) -> int:
    for process in processes:
        pages = sum(
            _unmerge_range(module, process, start, end, undumpable)
            for start, end in _ranges(process)
        )
        print(f"process {process.id.pid}: {pages} pages are private again")
    return 0


def _unmerge_range(module: Module, process: Process, start: int, end: int, undumpable: bool) -> int:
    pages = 0
    while start < end:
        done = module.unmerge(process.id, start, (end - start) // PAGE_BYTES, undumpable)
        pages += done.pages
        if done.next_address <= start:
            print(f"mergemem: no progress at address {start:#x}", file=sys.stderr)
            break
        start = done.next_address
    return pages


def _ranges(process: Process) -> Iterator[tuple[int, int]]:
    """Yield the addresses of neighbouring regions that hold anonymous mappings."""
    numbers = region_numbers(ProcFs().mappings(process.id.pid))
    for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
        if len(run):
            start = int(run[0]) << REGION_SHIFT
            yield start, start + len(run) * REGION_PAGES * PAGE_BYTES
