# SPDX-License-Identifier: MIT
"""`mergemem merge PID...`: once, now, without agent or policy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Final

import numpy as np

from mergemem_agent import outcome
from mergemem_agent.batch import look
from mergemem_agent.contract import PAGE_BYTES, Result
from mergemem_agent.counts import Counts
from mergemem_agent.error import MergememError
from mergemem_agent.info import Limits
from mergemem_agent.merge import Request
from mergemem_agent.module import Module, NoSuchProcess
from mergemem_agent.order import BATCH_REGIONS, SLICE_REGIONS, Slice, neighbours
from mergemem_agent.policy import DomainKind, HugePages, NumaNodes, Policy, Selector
from mergemem_agent.procfs import Process, ProcFs
from mergemem_agent.scan import region_numbers
from mergemem_agent.search import search
from mergemem_agent.targets import Target
from mergemem_agent.zero import zero_requests

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
    Result.HUGE: "part of a huge page that stays whole, or could not be split",
    Result.ALONE: "fine, but no other page of its group was",
    Result.ZEROED: "zeros, replaced by the kernel's zero page",
    Result.NODE: "on another NUMA node than its group",
}

_SLICES_AT_ONCE: Final = BATCH_REGIONS // SLICE_REGIONS


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    given = _parser().parse_args(arguments)
    policy = Policy(
        name="merge",
        select=Selector(),
        domain=DomainKind(given.domain),
        settle_seconds=0,
        include_undumpable=given.undumpable,
        zero_pages=given.zero_pages,
        huge=HugePages(given.huge),
        numa=NumaNodes(given.numa),
    )
    with Module() as module:
        return _merge(module, [_process(pid) for pid in dict.fromkeys(given.pids)], policy)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mergemem merge",
        description="Merge equal anonymous pages of the named processes, once.",
    )
    parser.add_argument("pids", metavar="PID", type=int, nargs="+", help="a process")
    parser.add_argument(
        "--undumpable", action="store_true", help="take processes that are not dumpable too"
    )
    parser.add_argument(
        "--domain",
        choices=[kind.value for kind in DomainKind],
        default=DomainKind.USER_AND_CGROUP.value,
        help="who may share pages with whom; policy, host: all; default: %(default)s",
    )
    parser.add_argument(
        "--huge",
        choices=[kind.value for kind in HugePages],
        default=HugePages.SKIP.value,
        help="what to do with huge pages of which 25%% or more are equal to others; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--numa",
        choices=[kind.value for kind in NumaNodes],
        default=NumaNodes.LOCAL.value,
        help="whether pages of different NUMA nodes may share; default: %(default)s",
    )
    parser.add_argument(
        "--no-zero-pages",
        dest="zero_pages",
        action="store_false",
        help="leave pages that are filled with zeros as they are",
    )
    return parser


def _process(pid: int) -> Process:
    process = ProcFs().process(pid)
    if process is None:
        raise NoSuchProcess(f"there is no process {pid}")
    if process.kernel_thread:
        raise MergememError(f"{pid} is a kernel thread", hint="name processes with memory")
    return process


def _merge(module: Module, processes: Sequence[Process], policy: Policy) -> int:
    limits = module.info().limits
    targets = [
        Target(process.id, policy, policy.domain_of(process), process.anonymous_bytes)
        for process in processes
    ]
    counts = Counts()
    _merge_equal(module, targets, limits, counts)
    if any(of_policy.split_folios for of_policy in counts.policies.values()):
        # Of each huge page a request holds only so much; the rest are small pages now.
        _merge_equal(module, targets, limits, counts)
    memories = [target.regions for target in targets]
    for request in zero_requests(memories, limits.max_candidates, limits.max_processes):
        _send(module, targets, request, counts)
    _report(targets, counts)
    return 0


def _merge_equal(module: Module, targets: Sequence[Target], limits: Limits, counts: Counts) -> None:
    for target in targets:
        _scan(module, target, limits)
    for pool in dict.fromkeys(target.pool for target in targets):
        members = [target for target in targets if target.pool == pool]
        for request in search([target.regions for target in members], pool.rules, limits):
            _send(module, members, request, counts)


def _send(module: Module, targets: Sequence[Target], request: Request, counts: Counts) -> None:
    named = [targets[index].process for index in request.processes]
    policy = targets[0].policy
    results = module.merge(
        named,
        request.candidates,
        named if policy.include_undumpable else (),
        any_node=policy.rules.any_node,
        split_percent=request.split_percent,
    )
    outcome.count(counts, targets, request, results)
    outcome.remember(targets, request, results)


def _scan(module: Module, target: Target, limits: Limits) -> None:
    """Look once at all memory of a process."""
    target.regions.replace(region_numbers(ProcFs().mappings(target.process.pid)))
    numbers = target.regions.rows["number"]
    starts = neighbours(numbers)
    counts = np.diff(starts, append=len(numbers))
    slices = [Slice(target, *each) for each in zip(starts.tolist(), counts.tolist(), strict=True)]
    for first in range(0, len(slices), _SLICES_AT_ONCE):
        batch = slices[first : first + _SLICES_AT_ONCE]
        looked = look(module, batch, limits.max_mappings, everything=True)
        for _, failure in looked.failed:
            raise failure
    target.regions.settle()


def _report(targets: Sequence[Target], counts: Counts) -> None:
    pages = sum(target.regions.pages for target in targets)
    domains = len({target.domain for target in targets})
    print(
        f"{pages} pages of {len(targets)} processes in {domains} "
        f"domain{'s' if domains > 1 else ''}, {counts.results.total()} nominated"
    )
    for result in Result:
        if counts.results[result]:
            print(f"  {result.name.lower():<10} {counts.results[result]:>10}  {MEANING[result]}")
    print(f"freed {_size(counts.freed_pages)}")
    folios = sum(policy.split_folios for policy in counts.policies.values())
    if folios:
        print(
            f"split {folios} huge pages and large folios, which freed "
            f"{_size(counts.split_freed_pages)}"
        )
    if counts.zero_freed_pages:
        print(f"and {_size(counts.zero_freed_pages)} that were zeros")


def _size(pages: int) -> str:
    return f"{pages} pages, {pages * PAGE_BYTES / 2**20:.1f} MiB"
