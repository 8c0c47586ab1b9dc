# SPDX-License-Identifier: MIT
"""All requests that the memory of some processes is worth: small pages first, then huge ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mergemem_agent.huge import HugeTally, split_requests
from mergemem_agent.index import nominate
from mergemem_agent.info import Limits
from mergemem_agent.merge import Request, requests
from mergemem_agent.policy import MergeRules
from mergemem_agent.region import Regions


def search(processes: Sequence[Regions], rules: MergeRules, limits: Limits) -> Iterator[Request]:
    """Yield requests for all equal pages of processes that may share under the same rules.

    Each is made when it is asked for. Between two of them pages may be marked, but regions must
    neither come nor go.
    """
    tally = HugeTally(processes) if rules.split_percent else None
    for nominated in nominate(processes, tally.show if tally else None):
        yield from requests(nominated, limits.max_candidates, limits.max_processes)
    if tally and rules.split_percent:
        yield from split_requests(
            processes, tally, rules.split_percent, limits.max_candidates, limits.max_processes
        )
