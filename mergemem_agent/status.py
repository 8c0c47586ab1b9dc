# SPDX-License-Identifier: MIT
"""`mergemem status`: what the module and the agent are doing, for people and for scripts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from mergemem_agent.contract import PAGE_BYTES, Feature, Result
from mergemem_agent.error import MergememError
from mergemem_agent.info import Info
from mergemem_agent.module import Module, PermissionDenied

STATUS_FILE: Final = Path("/run/mergemem/status.json")

# The agent writes every 2 s, but it may be held up by one long system call.
STALE_SECONDS: Final = 30.0


def main(arguments: Sequence[str]) -> int:
    """Run the command: exit status 0 when module and agent are both at work, else 1."""
    parser = argparse.ArgumentParser(
        prog="mergemem status",
        description="Show what the kernel module and the agent are doing.",
        epilog="Exit status 0: both are at work; 1: one of them is not.",
    )
    parser.add_argument("--json", action="store_true", help="everything there is, as JSON")
    parser.add_argument(
        "--status-file", type=Path, default=STATUS_FILE, metavar="FILE",
        help="where the agent leaves its status; default: %(default)s",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    module, module_problem = _ask_module()
    agent, agent_problem = _ask_agent(given.status_file)
    if given.json:
        print(json.dumps({"module": _module_values(module), "agent": agent}, indent=2))
    else:
        print("\n".join(_module_lines(module, module_problem)))
        print("\n".join(_agent_lines(agent, agent_problem)))
    return 0 if module and agent else 1


def _ask_module() -> tuple[Info | None, str]:
    """Return what INFO tells, or why it cannot be had."""
    if not Module.is_loaded():  # asking would have the kernel load it
        return None, "not loaded; load it with 'modprobe mergemem'"
    try:
        with Module() as module:
            return module.info(), ""
    except PermissionDenied as failure:
        return None, f"loaded, but it does not answer this user: {failure.hint}"
    except MergememError as failure:
        return None, f"{failure.message} ({failure.hint})"


def _ask_agent(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return what the agent wrote last, or why there is nothing to go by."""
    try:
        agent: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, "not running; start it with 'systemctl start mergemem'"
    except (OSError, ValueError) as failure:
        return None, f"its status file {path} cannot be read: {failure}"
    age_seconds = time.time() - agent["taken_at"]
    if age_seconds > STALE_SECONDS:
        return None, f"no sign of life for {age_seconds:.0f} s from process {agent['pid']}"
    return agent, ""


def running_agent(path: Path) -> int | None:
    """Return the process id of the agent that leaves its status there, if it is alive."""
    agent, _ = _ask_agent(path)
    return int(agent["pid"]) if agent and Path(f"/proc/{agent['pid']}").exists() else None


def _module_values(info: Info | None) -> dict[str, Any] | None:
    if info is None:
        return None
    values = dataclasses.asdict(info)
    results = values["counters"]["results"]
    values["counters"]["results"] = {result.name.lower(): n for result, n in results.items()}
    values["totals"]["saved_bytes"] = info.totals.saved_bytes
    values["totals"]["shared_bytes"] = info.totals.shared_bytes
    return values


def _module_lines(info: Info | None, problem: str) -> list[str]:
    if info is None:
        return [f"module   {problem}"]
    totals, counters, capped = info.totals, info.counters, info.limits.max_shared_bytes > 0
    results = ", ".join(
        f"{result.name.lower()} {count}" for result, count in counters.results.items() if count
    )
    return [
        f"module   version {info.module_version}, contract {info.contract_version}"
        + (", users may share (allow_cross_uid)" if Feature.CROSS_UID in info.features else "")
        + ("" if Feature.SPLIT in info.features else ", this kernel has no huge pages"),
        (
            f"         {totals.shared_mappings} mappings share {totals.shared_pages} pages: "
            f"{_mib(totals.saved_bytes)} saved"
        ),
        (
            f"         shared pages take {_mib(totals.shared_bytes)}, "
            + (f"cap {_mib(info.limits.max_shared_bytes)}" if capped else "no cap")
        ),
        (
            f"         since it was loaded: {counters.checksummed_pages} pages checksummed, "
            f"{counters.unmerged_pages} unmerged"
        ),
        (
            f"         {counters.results.get(Result.ZEROED, 0)} zero pages replaced, "
            f"{counters.split_folios} huge pages split, {counters.split_failures} in use"
        ),
        f"         candidates: {results or 'none'}",
    ]


def _agent_lines(agent: dict[str, Any] | None, problem: str) -> list[str]:
    if agent is None:
        return [f"agent    {problem}"]
    cpu_seconds = agent["user_seconds"] + agent["system_seconds"]
    queue, reload, counts = agent["queue"], agent["reload"], agent["counts"]
    lines = [
        (
            f"agent    version {agent['agent_version']}, process {agent['pid']}, "
            f"budget {agent['budget_percent']:g} % of one CPU, {cpu_seconds:.1f} s of CPU taken"
        ),
        f"         scan queue: {queue['regions']} regions of 2 MiB, {queue['due']} due",
        (
            f"         freed {_pages(counts['freed_pages'])} by merging; apart from that, "
            f"{_pages(counts['split_freed_pages'])} by splitting "
            f"{sum(each['split_folios'] for each in counts['policies'].values())} huge pages, and "
            f"{_pages(counts['zero_freed_pages'])} of zeros"
        ),
    ]
    cap_bytes = agent["max_shared_bytes"]
    if cap_bytes is not None:
        shared = sum(memory["shared_bytes"] for memory in agent["memory"].values())
        lines.append(f"         shared pages take {_mib(shared)}, cap {_mib(cap_bytes)}")
    if not reload["succeeded"]:
        lines.append("         the last reload of the policies FAILED: older ones are in force")
    lines.append(_row("policy", *(title for title, _ in _COLUMNS)))
    for name, memory in agent["memory"].items():
        values = memory | counts["policies"].get(name, {})
        lines.append(_row(name, *(show(values) for _, show in _COLUMNS)))
    return lines


# What the table tells of a policy: a title, and the text for its memory and counts.
_COLUMNS: Final[tuple[tuple[str, Callable[[dict[str, Any]], object]], ...]] = (
    ("targets", lambda values: values["targets"]),
    ("pages", lambda values: values["remembered_pages"]),
    ("merged", lambda values: values["merged_pages"]),
    ("saved", lambda values: _mib(values["saved_bytes"])),
    ("shared", lambda values: _mib(values["shared_bytes"])),
    ("cap", lambda values: "-" if not (cap := values["max_shared_bytes"]) else _mib(cap)),
    ("zeros", lambda values: values["zero_pages"]),
    ("zeroed", lambda values: values.get("zeroed", 0)),
    ("huge", lambda values: values["huge_pages"]),
    ("split", lambda values: values.get("split_folios", 0)),
)


def _pages(count: int) -> str:
    return f"{count} pages ({_mib(count * PAGE_BYTES)})"


def _row(name: str, *values: object) -> str:
    return f"{name:<20}" + "".join(f"{value!s:>11}" for value in values)


def _mib(count_bytes: float) -> str:
    return f"{count_bytes / 2**20:.1f} MiB"
