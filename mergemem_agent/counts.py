# SPDX-License-Identifier: MIT
"""What has happened since the agent started, and one consistent picture of it for others.

The pipeline's thread counts in a Counts; whoever wants to look (a scrape, `mergemem status`) gets
the last Snapshot, which never changes.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from mergemem_agent.contract import PAGE_BYTES, Result
from mergemem_agent.flow import Flow
from mergemem_agent.hint import HintState, SourceKind
from mergemem_agent.info import Info
from mergemem_agent.pressure import PressureState
from mergemem_agent.region import Regions
from mergemem_agent.scan import QueueState


@dataclass
class PolicyCounts:
    """Pages that went through the stages for one policy."""

    scanned: int = 0
    sampled: int = 0  # of which only a sample was read
    checksummed: int = 0  # read in full
    settled: int = 0
    broken: int = 0  # were merged, and then written to
    cpu_seconds: float = 0.0
    zeroed: int = 0  # in whose place the zero page is now
    capped: int = 0  # not nominated, as `max_shared` is reached
    split_folios: int = 0  # huge pages and large folios that were split


@dataclass(frozen=True)
class PolicyMemory:
    """What the targets of one policy hold right now, as last scanned."""

    targets: int = 0
    remembered_pages: int = 0
    merged_pages: int = 0
    saved_bytes: float = 0.0
    shared_bytes: float = 0.0  # its part of the shared frames
    max_shared_bytes: int | None = None
    zero_pages: int = 0
    huge_pages: int = 0

    @classmethod
    def of(cls, memories: Sequence[Regions], max_shared_bytes: int | None) -> PolicyMemory:
        """Add up what the processes of one policy hold."""
        totals = [regions.totals() for regions in memories]
        merged = sum(total.merged for total in totals)
        saved_bytes = sum(total.saved_bytes for total in totals)
        return cls(
            targets=len(totals),
            remembered_pages=sum(regions.pages for regions in memories),
            merged_pages=merged,
            saved_bytes=saved_bytes,
            # What a mapping does not save of its frame is its part of it.
            shared_bytes=max(0.0, merged * PAGE_BYTES - saved_bytes),
            max_shared_bytes=max_shared_bytes,
            zero_pages=sum(total.zero for total in totals),
            huge_pages=sum(total.huge for total in totals),
        )


@dataclass
class Counts:
    """Counted by the pipeline's thread alone, from 0 at its start."""

    policies: dict[str, PolicyCounts] = field(default_factory=dict)
    nominated: Counter[str] = field(default_factory=Counter)  # pages, by domain kind
    results: Counter[Result] = field(default_factory=Counter)  # candidates, by result
    # Frames that were freed: by merging small pages; by requests that split huge pages; and by
    # putting the zero page in the place of others. Three figures, never one.
    freed_pages: int = 0
    split_freed_pages: int = 0
    zero_freed_pages: int = 0
    errors: Counter[str] = field(default_factory=Counter)  # by stage
    cpu_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by stage
    rounds: int = 0
    flow: Flow = field(default_factory=Flow)

    def policy(self, name: str) -> PolicyCounts:
        """Return the counts of one policy."""
        return self.policies.setdefault(name, PolicyCounts())

    def done(self) -> int:
        """Return a number that grows with everything that was done to pages, or failed."""
        scanned = sum(policy.scanned for policy in self.policies.values())
        return scanned + self.results.total() + self.errors.total()

    def copy(self) -> Counts:
        """Return a copy that does not change when this one does."""
        return dataclasses.replace(
            self,
            policies={name: copy.copy(policy) for name, policy in self.policies.items()},
            nominated=self.nominated.copy(),
            results=self.results.copy(),
            errors=self.errors.copy(),
            cpu_seconds=self.cpu_seconds.copy(),
            flow=self.flow.copy(),
        )


@dataclass(frozen=True)
class ReloadState:
    """How the last attempt to load the policies went."""

    succeeded: bool = True
    successes: int = 0
    failures: int = 0
    succeeded_at: float = 0.0  # seconds since the epoch


@dataclass(frozen=True)
class Snapshot:
    """All that the agent tells about itself."""

    agent_version: str
    pid: int
    taken_at: float  # seconds since the epoch
    counts: Counts
    memory: dict[str, PolicyMemory]  # by policy
    queue: QueueState
    reload: ReloadState
    budget_percent: float  # at present: the policy's, or what pressure has made of it
    pressure: PressureState
    max_shared_bytes: int | None
    user_seconds: float
    system_seconds: float
    module: Info | None  # None: not loaded
    hints: HintState = field(default_factory=HintState)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, with names in place of enums, for JSON."""
        plain = _plain(self)
        assert isinstance(plain, dict)
        return plain


_PLAIN: Final = (int, float, str, bool, type(None))


def _plain(value: Any) -> Any:
    """Convert what json cannot, all the way down.

    dataclasses.asdict() will not do: it rebuilds a Counter from its items, and so counts those.
    """
    if type(value) in _PLAIN:  # nearly all
        return value
    if dataclasses.is_dataclass(value):
        return {
            field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, enum.Enum) and not isinstance(value, int):
        return value.value
    if isinstance(value, Flow):
        return [[a.name.lower(), b.name.lower(), pages] for a, b, pages in value.moves()]
    if isinstance(value, dict):
        return {
            key.name.lower() if isinstance(key, Result) else key: _plain(item)
            for key, item in value.items()
        }
    return value.value if isinstance(value, SourceKind) else value
