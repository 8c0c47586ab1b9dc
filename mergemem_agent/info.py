# SPDX-License-Identifier: MIT
"""What INFO tells of the loaded kernel module: its limits, its counters, and what is shared now."""

from __future__ import annotations

from dataclasses import dataclass

from mergemem_agent.contract import PAGE_BYTES, Feature, Result


@dataclass(frozen=True)
class Limits:
    """struct mergemem_limits: what one request may hold."""

    max_processes: int
    max_candidates: int
    max_unmerge_pages: int
    max_mappings: int  # of one shared page; MOREMAP beyond it
    max_shared_bytes: int  # NOMEM beyond it; 0: no limit


@dataclass(frozen=True)
class Counters:
    """struct mergemem_counters: what happened since the module was loaded."""

    checksummed_pages: int
    sampled_pages: int
    merge_requests: int
    unmerged_pages: int
    tlb_flushes: int
    lru_drains: int
    results: dict[Result, int]
    split_folios: int
    split_failures: int


@dataclass(frozen=True)
class Totals:
    """struct mergemem_totals: what is shared right now."""

    shared_pages: int
    shared_mappings: int

    @property
    def shared_bytes(self) -> int:
        """Memory that the shared pages take; it cannot be swapped."""
        return self.shared_pages * PAGE_BYTES

    @property
    def saved_bytes(self) -> int:
        """Memory that the shared pages save: one frame for each mapping but the first.

        The kernel's zero page, which took the place of zero-filled pages, is in neither figure.
        """
        return max(0, self.shared_mappings - self.shared_pages) * PAGE_BYTES


@dataclass(frozen=True)
class Info:
    """What INFO tells of the loaded module."""

    contract_version: int
    module_version: str
    features: Feature
    limits: Limits
    counters: Counters
    totals: Totals
