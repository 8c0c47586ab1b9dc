# SPDX-License-Identifier: MIT
"""Policies: which processes may share pages, with whom, and at what cost.

This is the whole language, without its syntax (`policy_file` reads that) and as docs/policies.md
tells it: policies are tried in order; the first whose `select` matches and none of whose `exclude`
does, decides. A policy may decide that the process is left alone for good.
"""

import enum
from dataclasses import dataclass
from typing import NamedTuple

from mergemem_agent.cgroup_path import container_of
from mergemem_agent.procfs import Process
from mergemem_agent.selector import Glob, GlobError, KeyCheck, Selector, SelectorCheck, User

__all__ = [
    "AgentSettings",
    "DomainKind",
    "Explanation",
    "Glob",
    "GlobError",
    "HugePages",
    "KeyCheck",
    "MergeRules",
    "NumaNodes",
    "Policy",
    "PolicyCheck",
    "PolicySet",
    "Selector",
    "SelectorCheck",
    "User",
    "Verdict",
]


class DomainKind(enum.Enum):
    """Who trusts each other enough to share pages, although sharing can be noticed.

    The kernel never lets different real users share, whatever a policy says, unless the module
    was loaded with allow_cross_uid=1.
    """

    USER = "user"
    CGROUP = "cgroup"
    POLICY = "policy"
    HOST = "host"
    USER_AND_CGROUP = "user+cgroup"


class HugePages(enum.Enum):
    """What becomes of equal pages that are part of huge pages and large folios."""

    SKIP = "skip"
    SPLIT = "split"


class NumaNodes(enum.Enum):
    """Between which pages a frame may be shared, on a host with several NUMA nodes."""

    LOCAL = "local"
    ANY = "any"


class MergeRules(NamedTuple):
    """How pages are merged. A request to the kernel has one set of them, for all of its pages."""

    split_percent: int | None = None  # least share of a huge page; None: huge pages stay whole
    any_node: bool = False


class Verdict(enum.Enum):
    """What one policy says of one process."""

    NOT_SELECTED = "not selected"
    EXCLUDED = "excluded"
    MERGE = "merge"
    LEAVE_ALONE = "leave alone"

    @property
    def decides(self) -> bool:
        """Whether no later policy is asked."""
        return self in (Verdict.MERGE, Verdict.LEAVE_ALONE)


@dataclass(frozen=True)
class Policy:
    """One entry of a policy file.

    `budget_percent` is of one CPU; `settle_seconds` is how far apart two equal checksums of a page
    must be. `split_percent` is how much of a huge page must be worth merging before it is split;
    `max_shared_bytes`, how much memory its shared pages may take (None: no cap). `source` is the
    "file:line" of the entry. With `merge` false its processes are left alone for good, and all
    but the selectors is without meaning.
    """

    name: str
    select: Selector
    exclude: tuple[Selector, ...] = ()
    domain: DomainKind = DomainKind.USER_AND_CGROUP
    budget_percent: float = 5.0
    settle_seconds: float = 10.0
    include_undumpable: bool = False
    source: str = ""
    merge: bool = True
    zero_pages: bool = True
    huge: HugePages = HugePages.SKIP
    split_percent: int = 25
    numa: NumaNodes = NumaNodes.LOCAL
    max_shared_bytes: int | None = None

    @property
    def rules(self) -> MergeRules:
        """How its pages are merged; with pages under other rules they never share."""
        split = self.huge is HugePages.SPLIT
        return MergeRules(
            split_percent=self.split_percent if split else None,
            any_node=self.numa is NumaNodes.ANY,
        )

    def domain_of(self, process: Process) -> str:
        """Return the trust domain; pages merge only where these strings are equal.

        The text does not name the policy unless the kind is POLICY: processes of two policies
        that have the same kind of domain may well share pages.
        """
        user = f"user={process.uid}"
        match self.domain:
            case DomainKind.USER:
                return user
            case DomainKind.CGROUP:
                return f"cgroup={container_of(process.cgroup)}"
            case DomainKind.POLICY:
                return f"policy={self.name}"
            case DomainKind.HOST:
                return "host"
            case DomainKind.USER_AND_CGROUP:
                return f"{user},cgroup={container_of(process.cgroup)}"

    def verdict(self, process: Process) -> Verdict:
        """Say what this policy means for a process that no earlier one has decided on."""
        if not self.select.matches(process):
            return Verdict.NOT_SELECTED
        if any(selector.matches(process) for selector in self.exclude):
            return Verdict.EXCLUDED
        return Verdict.MERGE if self.merge else Verdict.LEAVE_ALONE


@dataclass(frozen=True)
class AgentSettings:
    """The settings of the agent as a whole; budgets are of one CPU, user and system.

    While tasks wait for memory for more than `memory_pressure_percent` of the time, the first of
    the two other budgets holds; while they wait so for CPU, the second.
    """

    budget_percent: float = 5.0
    memory_pressure_percent: float = 10.0
    cpu_pressure_percent: float = 60.0
    memory_pressure_budget_percent: float = 20.0
    cpu_pressure_budget_percent: float = 1.0
    metrics_address: str = "127.0.0.1"
    metrics_port: int = 9119
    rescan_seconds: float = 10.0
    max_shared_bytes: int | None = None
    hints: bool = True  # from the kernel, as far as it gives them


@dataclass(frozen=True)
class PolicyCheck:
    """One policy held against one process: its verdict, and each key of each selector."""

    policy: Policy
    verdict: Verdict
    select: SelectorCheck
    exclude: tuple[SelectorCheck, ...]


@dataclass(frozen=True)
class Explanation:
    """Why a process has the policy that it has, or none.

    `checks` holds the policies that were tried, in order; the last is `winner`, unless that is
    None. `domain` is empty unless the process is to be merged.
    """

    process: Process
    checks: tuple[PolicyCheck, ...]
    winner: Policy | None
    domain: str


@dataclass(frozen=True)
class PolicySet:
    """All that the policy files say, in order of evaluation."""

    agent: AgentSettings = AgentSettings()
    policies: tuple[Policy, ...] = ()

    def match(self, process: Process) -> Policy | None:
        """Return the policy by which a process is merged; None: it is not."""
        if process.kernel_thread:
            return None
        for policy in self.policies:
            verdict = policy.verdict(process)
            if verdict.decides:
                return policy if verdict is Verdict.MERGE else None
        return None

    def explain(self, process: Process) -> Explanation:
        """Do as `match()`, and keep the reasons."""
        checks: list[PolicyCheck] = []
        for policy in () if process.kernel_thread else self.policies:
            check = PolicyCheck(
                policy=policy,
                verdict=policy.verdict(process),
                select=policy.select.check(process),
                exclude=tuple(selector.check(process) for selector in policy.exclude),
            )
            checks.append(check)
            if check.verdict.decides:
                domain = policy.domain_of(process) if policy.merge else ""
                return Explanation(process, tuple(checks), policy, domain)
        return Explanation(process, tuple(checks), None, "")
