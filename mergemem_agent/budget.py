# SPDX-License-Identifier: MIT
"""The CPU budget: percent of one core, user and system time together.

The control law. An account earns `percent / 100` CPU seconds each second, up to a balance of
BURST_SECONDS of earning; each slice of work is paid for after it was done, with the CPU time that
it took. Work starts only while the balance is positive, and what a slice overdraws is slept off
before the next one. So over any stretch of t seconds the work takes at most

    percent / 100 * (t + BURST_SECONDS) + one slice

and a slice is short: one merge request, one share of the index, or a look, which is made of as many
regions as are expected to take `slice_seconds`.

CPU time is that of the whole process (time.process_time), so it holds everything: reading /proc,
answering scrapes, and the kernel's checksums and merges too, as these run inside of system calls
of this process. There are two levels: the agent's account pays for all, and a slice that was done
for a policy is paid by the policy's account as well. Both must be positive.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

# A tenth above the budget is what any ten seconds may take: one second of earning, for the burst
# and the slice that overdraws it together.
BURST_SECONDS: Final = 0.5

# Of a full balance, what one slice should take.
_SLICE_SHARE: Final = 0.4

# A budget of nothing would wait for ever; this one works a second a day.
_LEAST_PERCENT: Final = 0.001

Clock = Callable[[], float]


class Account:
    """A balance of CPU seconds that fills with time. May be overdrawn by the last slice."""

    def __init__(self, percent: float, now: float) -> None:
        """Start with a full balance, so that a first look at a host comes at once."""
        self.percent = percent
        self._balance_seconds = self._full_seconds
        self._updated = now

    @property
    def _rate(self) -> float:
        return max(self.percent, _LEAST_PERCENT) / 100.0

    @property
    def _full_seconds(self) -> float:
        return self._rate * BURST_SECONDS

    def _earn(self, now: float) -> None:
        earned = (now - self._updated) * self._rate
        self._balance_seconds = min(self._full_seconds, self._balance_seconds + earned)
        self._updated = now

    def set_percent(self, percent: float, now: float) -> None:
        """Earn at another rate from now on; what was overdrawn stays so."""
        self._earn(now)
        self.percent = percent
        self._balance_seconds = min(self._balance_seconds, self._full_seconds)

    def pay(self, cpu_seconds: float, now: float) -> None:
        """Take what a slice has cost."""
        self._earn(now)
        self._balance_seconds -= cpu_seconds

    def wait_seconds(self, now: float) -> float:
        """Return how long to wait until there is something to spend again; 0: work now."""
        self._earn(now)
        if self._balance_seconds > 0:
            return 0.0
        # Until a tenth of a full balance is there: sleeping is cheap, waking up is not.
        return (self._full_seconds / 10 - self._balance_seconds) / self._rate


class Budget:
    """The agent's account and, by name, one for each policy."""

    def __init__(
        self,
        agent_percent: float,
        policy_percent: dict[str, float],
        clock: Clock = time.monotonic,
        cpu_clock: Clock = time.process_time,
    ) -> None:
        """Give each policy its percentage, and the agent one that holds over all of them."""
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._paid_until = cpu_clock()
        self._agent = Account(agent_percent, clock())
        self._agent_percent = agent_percent
        self._policy_percent = dict(policy_percent)
        self._policies = {
            name: Account(percent, clock()) for name, percent in policy_percent.items()
        }

    @property
    def percent(self) -> float:
        """What the agent may take of one CPU at present."""
        return self._agent.percent

    def slice_seconds(self, policy: str) -> float:
        """Return how much CPU time a policy's slice should take, where that can be chosen."""
        accounts = [self._agent, self._policies.get(policy, self._agent)]
        percent = min(account.percent for account in accounts)
        return percent / 100 * BURST_SECONDS * _SLICE_SHARE

    def set_percent(self, percent: float) -> None:
        """Let the agent take `percent` of one CPU, and each policy its own in proportion."""
        if percent == self._agent.percent:
            return
        now = self._clock()
        self._agent.set_percent(percent, now)
        for name, account in self._policies.items():
            share = percent / self._agent_percent
            account.set_percent(min(100.0, self._policy_percent[name] * share), now)

    def charge(self, policy: str = "") -> float:
        """Pay for the CPU time since the last charge, on behalf of a policy or of the agent alone.

        Returns it, in seconds.
        """
        cpu = self._cpu_clock()
        spent, self._paid_until = cpu - self._paid_until, cpu
        now = self._clock()
        self._agent.pay(spent, now)
        if policy in self._policies:
            self._policies[policy].pay(spent, now)
        return spent

    def wait_seconds(self) -> float:
        """Return how long the agent has to pause; what it did unnoticed is charged first."""
        self.charge()
        return self._agent.wait_seconds(self._clock())

    def policy_wait_seconds(self, policy: str) -> float:
        """Return how long a policy's work has to pause."""
        account = self._policies.get(policy)
        return account.wait_seconds(self._clock()) if account else 0.0
