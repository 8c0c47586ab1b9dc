# SPDX-License-Identifier: MIT
"""The caps on shared pages, which cannot be swapped: `max_shared` of a policy, and of the agent.

A frame that a policy's processes map n of m times counts as n / m frames of that policy. Beyond
a cap no new shared frame is asked for; pages still join frames that are there, as that takes none.
The kernel module has a cap of its own, max_shared_bytes, for all shared frames of the host.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergemem_agent.contract import PAGE_BYTES
from mergemem_agent.counts import PolicyMemory
from mergemem_agent.merge import Request, new_frames
from mergemem_agent.policy import Policy, PolicySet

Array = np.ndarray[Any, np.dtype[Any]]


class Caps:
    """How many frames each policy, and the agent, may still turn into shared ones."""

    def __init__(self, policies: PolicySet, memory: Mapping[str, PolicyMemory]) -> None:
        """Start from what is shared now, as last scanned."""
        shared = {name: values.shared_bytes for name, values in memory.items()}
        self._all = _room(policies.agent.max_shared_bytes, sum(shared.values()))
        self._room = {
            policy.name: _room(policy.max_shared_bytes, shared.get(policy.name, 0.0))
            for policy in policies.policies
        }

    @property
    def unlimited(self) -> bool:
        """Whether there is no cap at all."""
        return self._all == math.inf and all(room == math.inf for room in self._room.values())

    def trim(self, request: Request, policies: Sequence[Policy]) -> tuple[Array, Counter[str]]:
        """Say which candidates may be sent, and how many pages of each policy may not.

        `policies` has that of each process of the search that the request came from. A new frame
        is its group's first page's policy's.
        """
        if self.unlimited:
            return np.ones(len(request.nominated), dtype=np.bool_), Counter()
        groups = request.groups
        numbers, first, sizes = np.unique(groups, return_index=True, return_counts=True)
        anchored = np.isin(numbers, groups[request.nominated["anchor"]])
        allowed = anchored | (numbers < 0)  # zeros take no frame
        total, rooms = self._all, dict(self._room)
        capped: Counter[str] = Counter()
        for index in np.flatnonzero(~allowed).tolist():
            name = policies[int(request.nominated["process"][first[index]])].name
            if total >= 1 and rooms.get(name, math.inf) >= 1:
                total -= 1
                rooms[name] = rooms.get(name, math.inf) - 1
                allowed[index] = True
            else:
                capped[name] += int(sizes[index])
        return allowed[np.searchsorted(numbers, groups)], capped

    def take(self, request: Request, results: Array, policies: Sequence[Policy]) -> None:
        """Count the new shared frames of a request that was sent."""
        if self.unlimited:
            return
        numbers, first = np.unique(request.groups, return_index=True)
        made = np.isin(numbers, new_frames(request, results))
        for index in first[made].tolist():
            name = policies[int(request.nominated["process"][index])].name
            self._all -= 1
            self._room[name] = self._room.get(name, math.inf) - 1


def _room(cap_bytes: int | None, shared_bytes: float) -> float:
    if cap_bytes is None:
        return math.inf
    return max(0.0, (cap_bytes - shared_bytes) / PAGE_BYTES)
