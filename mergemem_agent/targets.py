# SPDX-License-Identifier: MIT
"""Targets: the processes that policies choose, kept in step with /proc, and with events.

Finding processes must cost next to nothing, however many there are. Each sync reads one small
file of each process for its ProcessId; only new ones are read in full and shown to the policies.
What a policy has no use for yet may grow into it: a process is looked at again when it is twice as
old as it was (it may have been too young, too small, or another program before its exec), and at
the latest after RECHECK_SECONDS, or when the agent wakes up next (nap.py). The same check, at that
pace, finds targets that have changed.

Where the kernel tells of forks, execs and exits, /proc is read in full only now and then, or at
once when it is known that events were lost. Whoever is new is looked at LOOK_SECONDS later: by then
most of those that only live for a moment are gone, and cost one system call.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from mergemem_agent.hint import ProcessEvents
from mergemem_agent.policy import MergeRules, Policy, PolicySet
from mergemem_agent.procfs import Process, ProcessId, ProcFs
from mergemem_agent.region import Regions

RECHECK_SECONDS: Final = 60.0
RECHECK_FIRST_SECONDS: Final = 1.0
# It has no memory to merge; by an exec it becomes a program like others, of which events tell.
KERNEL_THREAD_SECONDS: Final = 600.0

# The kernel would only refuse it again: not dumpable, or a security module objects.
REFUSED_SECONDS: Final = 300.0

# Of processes that events told of: when they are looked at, how many in one go, and how many may
# wait. In a storm of forks the last few limits hold; whoever does not fit is found in /proc.
LOOK_SECONDS: Final = 0.25
LOOKS_AT_ONCE: Final = 256
MAX_WAITING: Final = 8192

# Lost events are repaired at once, but not more often than this.
REPAIR_SECONDS: Final = 2.0


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


class _Newcomer(NamedTuple):
    """A process that an event told of."""

    due: float  # when to look at it
    executed: bool  # it is another program than before, if there was it before


class Targets:
    """All targets, by process."""

    def __init__(self, policies: PolicySet, procfs: ProcFs) -> None:
        """Choose nobody yet: see sync()."""
        self._policies = policies
        self._procfs = procfs
        self._targets: dict[ProcessId, Target] = {}
        self._recheck: dict[ProcessId, float] = {}
        self._waiting: dict[int, _Newcomer] = {}  # by pid, in order of arrival
        self._rechecked = self._repaired = -math.inf
        self._incomplete = False  # events were lost, and not made up for yet
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

    @property
    def waiting(self) -> int:
        """How many processes wait to be looked at, that events told of."""
        return len(self._waiting)

    def change_policies(self, policies: PolicySet) -> None:
        """Put other policies in force: everybody is shown to them at the next sync()."""
        self._policies = policies
        self._recheck.clear()

    def take_events(self, events: ProcessEvents) -> bool:
        """Follow events, and look at who is due; True: there are other targets now than before."""
        now, before = time.monotonic(), list(self._targets.values())
        self._end(events.ended)
        for pid in events.forked | events.executed:
            executed = pid in events.executed or (
                pid in self._waiting and self._waiting[pid].executed
            )
            self._waiting[pid] = _Newcomer(now + LOOK_SECONDS, executed)
        if len(self._waiting) > MAX_WAITING:
            self._waiting.clear()
            self._incomplete = True
        self._incomplete |= not events.complete
        if self._incomplete and now - self._repaired >= REPAIR_SECONDS:
            self._repair(now)
        else:
            self._look_at_newcomers(now)
            self._recheck_due(now)
        return before != list(self._targets.values())

    def sync(self) -> None:
        """Bring the targets in step with /proc."""
        now = time.monotonic()
        alive = self._procfs.process_ids()
        for gone in (self._recheck.keys() | self._targets.keys()) - set(alive):
            self._recheck.pop(gone, None)
            self._targets.pop(gone, None)
        for process in alive:
            if self._recheck.get(process, 0.0) <= now:
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

    def _end(self, pids: Set[int]) -> None:
        """Forget processes that have ended, and whatever was known of their memory."""
        for pid in pids:
            self._waiting.pop(pid, None)
        gone = [process for process in self._targets if process.pid in pids] if pids else []
        for process in gone:
            self.forget(self._targets[process])

    def _repair(self, now: float) -> None:
        """Look at everybody: some have come, gone or changed, and nobody has told who."""
        self._incomplete, self._repaired = False, now
        self._waiting.clear()
        self._recheck.clear()
        self.sync()

    def _look_at_newcomers(self, now: float) -> None:
        due = [pid for pid, newcomer in self._waiting.items() if newcomer.due <= now]
        for pid in due[:LOOKS_AT_ONCE]:
            self._look(pid, now, executed=self._waiting.pop(pid).executed)

    def _recheck_due(self, now: float) -> None:
        """Look again at those who may have grown into a policy, or out of it."""
        if now - self._rechecked < RECHECK_FIRST_SECONDS:
            return
        self._rechecked = now
        due = [process for process, time_due in self._recheck.items() if time_due <= now]
        for process in due:
            self._check(process, now)

    def _check(self, identity: ProcessId, now: float) -> None:
        """Look at one process again, unless another one has its pid by now."""
        if not self._look(identity.pid, now, identity):
            # Gone meanwhile, or a zombie that nobody reaps.
            self._targets.pop(identity, None)
            self._recheck.pop(identity, None)

    def _look(
        self, pid: int, now: float, wanted: ProcessId | None = None, executed: bool = False
    ) -> bool:
        """Show one process to the policies, and take it in, change it, or drop it.

        Returns whether it is there, and is the one that is wanted.
        """
        if pid == self._own_pid:
            # The agent itself is no target: looking at its pages is what changes them.
            return True
        process = self._procfs.process(pid)
        if process is None or wanted not in (None, process.id):
            return False
        identity = process.id
        wait = min(max(process.age_seconds, RECHECK_FIRST_SECONDS), RECHECK_SECONDS)
        if process.kernel_thread:
            wait = KERNEL_THREAD_SECONDS
        self._recheck[identity] = now + wait
        known = self._targets.get(identity)
        if known and executed:
            # Another program: nothing that is known of the one before holds of it.
            self._targets.pop(identity)
            known = None
        if known:
            # Merged pages are no anonymous memory to the kernel's counters. A target must not
            # fall below its policy's minimum because merging was such a success.
            anonymous_bytes = max(known.anonymous_bytes, process.anonymous_bytes)
            process = replace(process, anonymous_bytes=anonymous_bytes)
            known.anonymous_bytes = anonymous_bytes
        self._decide(process, known)
        return True

    def _decide(self, process: Process, known: Target | None) -> None:
        policy = self._policies.match(process)
        if policy is None:
            self._targets.pop(process.id, None)
        elif known is None:
            self._targets[process.id] = Target(
                process.id, policy, policy.domain_of(process), process.anonymous_bytes
            )
        else:
            before = known.pool, known.policy.zero_pages
            known.policy, known.domain = policy, policy.domain_of(process)
            if before != (known.pool, policy.zero_pages):
                # Other partners, or other kinds of pages: start over, instead of when it is due.
                known.regions, known.mapped = Regions(), 0.0
