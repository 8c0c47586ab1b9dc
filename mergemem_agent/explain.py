# SPDX-License-Identifier: MIT
"""``mergemem policy``: what the policies mean, for a file and for one process.

``check`` reports all errors of policy files. ``explain`` tells which policy a process has and why,
with whom it would share pages, and which of its mappings are never merged. Neither needs the
kernel module.
"""

import argparse
import pwd
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mergemem_agent.error import PermissionDenied, ProcessGone
from mergemem_agent.policy import (
    Explanation,
    HugePages,
    NumaNodes,
    Policy,
    PolicyCheck,
    PolicySet,
    Verdict,
)
from mergemem_agent.policy_file import DEFAULT_ROOT, default_paths, load
from mergemem_agent.procfs import PAGE_BYTES, Mapping, Process, ProcFs
from mergemem_agent.quantity import format_duration, format_percent, format_size
from mergemem_agent.selector import SelectorCheck

# The codes of VmFlags in /proc/PID/smaps for which the module refuses a mapping; its list is
# REFUSED_VM_FLAGS in kmod/target.c.
REFUSED_FLAGS = {
    "sh": "shared between processes already",
    "ms": "shared between processes already",
    "pf": "page frames of a device",
    "io": "memory of a device",
    "mm": "pages of a driver",
    "de": "pages of a driver",
    "ht": "huge TLB pages",
    "lo": "locked in memory, mlock(2)",
    "dd": "kept out of core dumps, MADV_DONTDUMP: so are secrets",
    "wf": "wiped on fork, MADV_WIPEONFORK: so are secrets",
    "um": "watched by userfaultfd(2)",
    "uw": "watched by userfaultfd(2)",
    "ui": "watched by userfaultfd(2)",
    "ur": "watched by userfaultfd(2)",
    "ss": "a shadow stack",
    "dp": "may be dropped at any time, MAP_DROPPABLE",
}
_FILE_BACKED = "backed by a file"
_SPECIAL = "the kernel's own pages"


def refusals(mapping: Mapping) -> tuple[str, ...]:
    """Return why a mapping, which was read with its flags, is never merged; empty: it may be."""
    private = mapping.permissions[3] == "p"
    if private and not mapping.inode and not mapping.anonymous:
        return (_SPECIAL,)  # whatever flags it has, they only follow from that
    reasons = [_FILE_BACKED] if mapping.inode else []
    if not private:
        reasons.append(REFUSED_FLAGS["sh"])
    reasons += [reason for flag, reason in REFUSED_FLAGS.items() if flag in mapping.flags]
    return tuple(dict.fromkeys(reasons))


def main(arguments: Sequence[str]) -> int:
    """Run ``mergemem policy ARGUMENTS``; return the exit status. Raises MergememError."""
    options = _parser().parse_args(arguments)
    lines: Iterable[str]
    if options.command == "check":
        paths = options.files or default_paths()
        lines = describe(paths, load(paths))
    else:
        paths = options.policy or default_paths()
        lines = explain(load(paths), ProcFs(), options.pid, options.all_mappings)
    for line in lines:
        print(_printable(line))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mergemem policy", description="Check policy files, and explain what they do."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    default = f"default: {DEFAULT_ROOT}/mergemem.yaml and {DEFAULT_ROOT}/policy.d/*.yaml"
    check = commands.add_parser(
        "check",
        help="report every error of policy files",
        description="Report every error of policy files, as FILE:LINE:COLUMN: what is wrong.",
    )
    check.add_argument("files", nargs="*", type=Path, metavar="FILE", help=default)
    explain = commands.add_parser(
        "explain",
        help="tell which policy a process has, and why",
        description="Tell which policy a process has and why, its domain, and which of its "
        "mappings are never merged.",
    )
    explain.add_argument("pid", type=_pid, metavar="PID")
    explain.add_argument(
        "--policy", action="append", type=Path, metavar="FILE", help=f"may be repeated; {default}"
    )
    explain.add_argument(
        "--all-mappings", action="store_true", help="list each mapping, those of files too"
    )
    return parser


def _pid(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a process id")
    return int(text)


# --- check ---------------------------------------------------------------------------------------


def describe(paths: Sequence[Path], policies: PolicySet) -> Iterator[str]:
    """Yield what correct files say: a line for each policy, in order of evaluation."""
    if not paths:
        yield f"no policy files in {DEFAULT_ROOT}: no process is merged"
        return
    yield f"{_count(len(policies.policies), 'policy', 'policies')} in {_count(len(paths), 'file')}"
    for number, policy in enumerate(policies.policies, 1):
        yield f"{number:3}. {policy.name} ({policy.source}): {_effect(policy)}"


def _effect(policy: Policy) -> str:
    if not policy.merge:
        return "never merged"
    parts = [
        f"domain {policy.domain.value}",
        f"budget {format_percent(policy.budget_percent)}",
        f"settle {format_duration(policy.settle_seconds)}",
        "zero pages too" if policy.zero_pages else "no zero pages",
        "huge pages stay whole"
        if policy.huge is HugePages.SKIP
        else f"huge pages split from {format_percent(policy.split_percent)} on",
    ]
    if policy.numa is NumaNodes.ANY:
        parts.append("across NUMA nodes")
    if policy.max_shared_bytes is not None:
        parts.append(f"at most {format_size(policy.max_shared_bytes)} of shared pages")
    if policy.include_undumpable:
        parts.append("undumpable processes too")
    return ", ".join(parts)


# --- explain -------------------------------------------------------------------------------------


def explain(
    policies: PolicySet, procfs: ProcFs, pid: int, all_mappings: bool = False
) -> Iterator[str]:
    """Yield the whole explanation for one process. Raises ProcessGone."""
    process = procfs.process(pid)
    if process is None:
        raise ProcessGone(f"there is no process {pid}")
    dumpable = procfs.dumpable(pid)
    explanation = policies.explain(process)
    yield from _describe_process(process, dumpable)
    yield ""
    yield from _describe_checks(policies, explanation)
    yield ""
    yield f"verdict: {_verdict(explanation, dumpable)}"
    if explanation.winner and explanation.winner.merge:
        yield f"how: {_effect(explanation.winner)}"
    if process.kernel_thread:
        return
    yield ""
    try:
        yield from describe_mappings(procfs.mappings(pid, with_flags=True), all_mappings)
    except PermissionDenied as error:
        yield f"mappings: {error.message}; {error.hint}"


def _describe_process(process: Process, dumpable: bool | None) -> Iterator[str]:
    yield f"process {process.id.pid}"
    yield f"  executable    {process.executable or '(unreadable)'}"
    yield f"  command line  {' '.join(process.command_line) or '(none)'}"
    yield f"  user          {process.uid}{_user_name(process.uid)}"
    yield f"  cgroup        {process.cgroup}"
    yield f"  anonymous     {format_size(process.anonymous_bytes)} in memory"
    yield f"  age           {format_duration(process.age_seconds)}"
    if not process.kernel_thread:
        told = {True: "yes", False: "no", None: "cannot be told of processes of root"}
        yield f"  dumpable      {told[dumpable]}"


def _user_name(uid: int) -> str:
    try:
        return f" ({pwd.getpwuid(uid).pw_name})"
    except KeyError:
        return ""


def _describe_checks(policies: PolicySet, explanation: Explanation) -> Iterator[str]:
    yield "policies, in order; the first that does not pass the process on decides"
    if not policies.policies:
        yield "  (none)"
    for number, check in enumerate(explanation.checks, 1):
        yield f"{number:3}. {check.policy.name} ({check.policy.source}): {check.verdict.value}"
        yield from _describe_check(check)
    untried = len(policies.policies) - len(explanation.checks)
    if untried:
        yield f"     {_count(untried, 'policy', 'policies')} not asked"


def _describe_check(check: PolicyCheck) -> Iterator[str]:
    yield from _describe_selector("select", check.select)
    # Whom a policy does not select, it need not exclude.
    if check.verdict is not Verdict.NOT_SELECTED:
        for index, exclude in enumerate(check.exclude):
            yield from _describe_selector(f"exclude[{index}]", exclude)


def _describe_selector(title: str, selector: SelectorCheck) -> Iterator[str]:
    yield f"       {title}: {'matches' if selector.matched else 'does not match'}"
    for key in selector.keys:
        answer = "yes" if key.matched else "no"
        yield f"         {answer:3}  {key.key}: {key.wanted!r}, is {key.found!r}"


def _verdict(explanation: Explanation, dumpable: bool | None) -> str:
    winner = explanation.winner
    if explanation.process.kernel_thread:
        return "not merged: a kernel thread has no memory of its own"
    if winner is None:
        return "not merged: no policy wants it"
    if not winner.merge:
        return f"not merged: policy {winner.name!r} says merge: never"
    if dumpable is False and not winner.include_undumpable:
        return (
            f"not merged: the process is not dumpable, and policy {winner.name!r} does not say "
            "include_undumpable: true"
        )
    doubt = ", if the process is dumpable" if dumpable is None else ""
    unless = "" if winner.include_undumpable else doubt
    return f"merged by policy {winner.name!r}, within domain {explanation.domain}{unless}"


# --- mappings ------------------------------------------------------------------------------------


def describe_mappings(mappings: Iterable[Mapping], all_mappings: bool) -> Iterator[str]:
    """Yield what of the address space may be merged, and the rest by reason.

    The mappings themselves are listed where the reason is not plain from their kind: those with
    a file and the kernel's own only if `all_mappings`, since every process has dozens of them.
    """
    groups: dict[tuple[str, ...], list[Mapping]] = defaultdict(list)
    for mapping in mappings:
        groups[refusals(mapping)].append(mapping)
    yield "mappings (sizes are of address space, in memory or not)"
    if not groups:
        yield "  (none)"
    # What may be merged has no reasons, and comes first.
    for reasons in sorted(groups):
        members = groups[reasons]
        size_bytes = sum(mapping.pages for mapping in members) * PAGE_BYTES
        title = f"refused: {'; '.join(reasons)}" if reasons else "may be merged"
        yield f"  {format_size(size_bytes):>9} in {_count(len(members), 'mapping')}  {title}"
        plain = not reasons or reasons[0] in (_FILE_BACKED, _SPECIAL)
        if all_mappings or not plain:
            yield from map(_describe_mapping, members)


def _describe_mapping(mapping: Mapping) -> str:
    size = format_size(mapping.pages * PAGE_BYTES)
    name = f" {mapping.name}" if mapping.name else ""
    return f"            {mapping.start:012x}-{mapping.end:012x} {mapping.permissions} {size}{name}"


def _count(number: int, singular: str, plural: str = "") -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def _printable(line: str) -> str:
    """Escape what a terminal might obey: processes name themselves as they like."""
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in line
    )
