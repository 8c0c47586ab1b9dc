# SPDX-License-Identifier: MIT
"""Targets: the processes that policies choose, kept in step with /proc.

Finding processes must cost next to nothing, however many there are. Each sync reads one small
file of each process for its ProcessId; only new ones are read in full and shown to the policies.
What a policy has no use for yet may grow into it: a process is looked at again when it is twice as
old as it was (it may have been too young, too small, or another program before its exec), and at
the latest after RECHECK_SECONDS. The same check, at that pace, finds targets that have changed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from mergemem_agent.policy import MergeRules, Policy, PolicySet
from mergemem_agent.procfs import ProcessId, ProcFs
from mergemem_agent.region import Regions

RECHECK_SECONDS: Final = 60.0
RECHECK_FIRST_SECONDS: Final = 1.0

# The kernel would only refuse it again: not dumpable, or a security module objects.
REFUSED_SECONDS: Final = 300.0


class Pool(NamedTuple):
    """Processes that share pages with each other: one trust domain, one set of rules.

    The rules are those of a whole request to the kernel, so pages under different ones cannot meet.
    """

    domain: str
    rules: MergeRules


@dataclass(eq=False)
class Target:
    """A process that a policy has chosen, and what is known of its memory."""

    process: ProcessId
    policy: Policy
    domain: str
    anonymous_bytes: int  # the most that it was seen with
    regions: Regions = field(default_factory=Regions)
    mapped: float = 0.0  # when its mappings are to be read next, as time.monotonic() has it

    @property
    def pool(self) -> Pool:
        """With whom it shares."""
        return Pool(self.domain, self.policy.rules)


class Targets:
    """All targets, by process."""

    def __init__(self, policies: PolicySet, procfs: ProcFs) -> None:
        """Choose nobody yet: see sync()."""
        self._policies = policies
        self._procfs = procfs
        self._targets: dict[ProcessId, Target] = {}
        self._recheck: dict[ProcessId, float] = {}
        self._own_pid = os.getpid()

    def __iter__(self) -> Iterator[Target]:
        """Iterate over the targets in the order in which they were found."""
        return iter(list(self._targets.values()))

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._targets)

    def __contains__(self, target: Target) -> bool:
        """Tell whether a target is one still."""
        return self._targets.get(target.process) is target

    @property
    def policies(self) -> PolicySet:
        """The policies in force."""
        return self._policies

    def change_policies(self, policies: PolicySet) -> None:
        """Put other policies in force: everybody is shown to them at the next sync()."""
        self._policies = policies
        self._recheck.clear()

    def sync(self) -> None:
        """Bring the targets in step with /proc."""
        now = time.monotonic()
        alive = self._procfs.process_ids()
        for gone in (self._recheck.keys() | self._targets.keys()) - set(alive):
            self._recheck.pop(gone, None)
            self._targets.pop(gone, None)
        for process in alive:
            # The agent itself is no target: looking at its pages is what changes them.
            if process.pid != self._own_pid and self._recheck.get(process, 0.0) <= now:
                self._check(process, now)

    def pool(self, pool: Pool) -> list[Target]:
        """Return the targets that share with each other."""
        return [target for target in self._targets.values() if target.pool == pool]

    def refuse(self, target: Target) -> None:
        """Leave a process alone for a while that the kernel does not let us touch."""
        self._targets.pop(target.process, None)
        self._recheck[target.process] = time.monotonic() + REFUSED_SECONDS

    def forget(self, target: Target) -> None:
        """Drop a process that is gone. Should it be there after all, the next sync() finds it."""
        self._targets.pop(target.process, None)
        self._recheck.pop(target.process, None)

    def _check(self, identity: ProcessId, now: float) -> None:
        """Show one process to the policies, and take it in, change it, or drop it."""
        process = self._procfs.process(identity.pid)
        if process is None or process.id != identity:
            # Gone meanwhile, or a zombie that nobody reaps.
            self._targets.pop(identity, None)
            return
        wait = min(max(process.age_seconds, RECHECK_FIRST_SECONDS), RECHECK_SECONDS)
        self._recheck[identity] = now + wait
        known = self._targets.get(identity)
        if known:
            # Merged pages are no anonymous memory to the kernel's counters. A target must not
            # fall below its policy's minimum because merging was such a success.
            anonymous_bytes = max(known.anonymous_bytes, process.anonymous_bytes)
            process = replace(process, anonymous_bytes=anonymous_bytes)
            known.anonymous_bytes = anonymous_bytes
        policy = self._policies.match(process)
        if policy is None:
            self._targets.pop(identity, None)
        elif known is None:
            self._targets[identity] = Target(
                identity, policy, policy.domain_of(process), process.anonymous_bytes
            )
        else:
            before = known.pool, known.policy.zero_pages
            known.policy, known.domain = policy, policy.domain_of(process)
            if before != (known.pool, policy.zero_pages):
                # Other partners, or other kinds of pages: start over, instead of when it is due.
                known.regions, known.mapped = Regions(), 0.0
