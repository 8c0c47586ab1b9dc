# SPDX-License-Identifier: MIT
"""`mergemem agent`: the long-running service around the pipeline.

It loads policies, opens the kernel module as soon as that is there, and runs round after round of
the pipeline. One thread does it all, so that one thread alone talks to the module; another serves
metrics from a snapshot. Signals set a flag, which is looked at between any two slices: SIGTERM and
SIGINT end the agent, SIGHUP makes it read its policies again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import select
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from mergemem_agent import __version__, heap
from mergemem_agent.budget import Budget
from mergemem_agent.counts import ReloadState, Snapshot
from mergemem_agent.error import MergememError
from mergemem_agent.hint import Hint
from mergemem_agent.hint_source import open_hints
from mergemem_agent.info import Limits
from mergemem_agent.metrics import MetricsServer
from mergemem_agent.module import Module, ModuleMissing, PermissionDenied
from mergemem_agent.nap import IDLE_SECONDS, Naps
from mergemem_agent.notify import Notifier
from mergemem_agent.pipeline import Pipeline
from mergemem_agent.policy import PolicySet
from mergemem_agent.policy_file import default_paths, load
from mergemem_agent.pressure import Pressure
from mergemem_agent.procfs import ProcFs
from mergemem_agent.signals import Signals

log = logging.getLogger(__name__)

STATUS_FILE: Final = Path("/run/mergemem/status.json")

# How often a missing module is looked for.
MODULE_SECONDS: Final = 1.0

# How often a snapshot is taken while pages are looked at, and while none are.
SNAPSHOT_SECONDS: Final = 5.0
IDLE_SNAPSHOT_SECONDS: Final = 20.0


class _RoundOver(Exception):
    """A signal wants the agent's attention: the round ends between two slices."""


@dataclass(frozen=True)
class Options:
    """The command line of the agent."""

    policy_files: tuple[Path, ...]  # none: the default paths
    rounds: int | None  # None: until a signal
    status_file: Path


class Agent:
    """The service: everything that lives from start to stop."""

    def __init__(self, options: Options, procfs: ProcFs, notifier: Notifier) -> None:
        """Load the policies. Raises PolicyErrors, or MergememError when no metrics port is had."""
        self._options = options
        self._notifier = notifier
        self._policies = _load(options)
        self._reload = ReloadState(successes=1, succeeded_at=time.time())
        # Before the budget begins: to compile takes seconds of CPU time, once, which would be
        # slept off at a few percent of a core.
        self._source = open_hints(self._policies.agent.hints)
        self._budget = _budget(self._policies)
        self._pressure = Pressure(self._policies.agent)
        self._signals = Signals()
        self._pipeline = Pipeline(
            self._policies,
            procfs,
            self._budget,
            self._pace,
            hints=self._hints,
            events=lambda: self._source.events(),
        )
        self._module: Module | None = None
        self._limits: Limits | None = None
        self._missing_told = ""
        self._followed = 0.0  # when events were last taken
        self._naps = Naps(self._source.poll_seconds, time.monotonic())
        self._stirred = False  # there were some, or somebody was waiting to be looked at
        self._snapshot_taken = self._snapshot_due = 0.0
        self._told = (0, 0)  # how far the snapshot has come
        self._snapshot = self._take_snapshot()
        settings = self._policies.agent
        self._server = MetricsServer(
            settings.metrics_address, settings.metrics_port, lambda: self._snapshot
        )

    def run(self) -> None:
        """Work until a signal says stop, or until the rounds that were asked for are done."""
        settings = self._policies.agent
        log.info(
            "agent %s: %d policies, budget %g %% of one CPU, metrics on %s port %d",
            __version__, len(self._policies.policies), settings.budget_percent,
            settings.metrics_address, self._server.port,
        )  # fmt: skip
        self._notifier.ready()
        try:
            while not self._signals.stop and not self._rounds_done():
                self._turn()
        finally:
            self._notifier.stopping()
            self._close_module()
            self._source.close()
            self._server.close()
            with contextlib.suppress(OSError):
                self._options.status_file.unlink()
        log.info("agent: stopped after %d rounds", self._pipeline.counts.rounds)

    def _turn(self) -> None:
        """React to signals, then do one round, or wait for the module."""
        if self._signals.reload:
            self._reload_policies()
        try:
            if self._open_module() and self._module and self._limits:
                self._pipeline.round(self._module, self._limits)
                self._publish(force=self._options.rounds is not None)
                if not self._rounds_done():
                    self._idle(max(0.05, self._pipeline.idle_seconds()))
            else:
                self._pipeline.find_targets()
                self._idle(MODULE_SECONDS, hinted=False)
        except _RoundOver:
            pass
        except (ModuleMissing, PermissionDenied) as failure:
            self._lose_module(failure)

    def _progress(self) -> tuple[int, int]:
        return self._pipeline.counts.done(), len(self._pipeline.targets)

    def _rounds_done(self) -> bool:
        wanted = self._options.rounds
        return wanted is not None and self._pipeline.counts.rounds >= wanted

    # --- pauses ------------------------------------------------------------------------------

    def _pace(self) -> None:
        """Pause after a slice as the budget demands. Raises _RoundOver when a signal came."""
        if self._progress() != self._told:
            self._snapshot_due = min(self._snapshot_due, self._snapshot_taken + SNAPSHOT_SECONDS)
        self._publish()
        self._follow()
        while not self._signals.pending and (wait := self._budget.wait_seconds()) > 0:
            self._idle(wait, hinted=False)
        if self._signals.pending:
            raise _RoundOver

    def _idle(self, seconds: float, hinted: bool = True) -> None:
        """Sleep, while the watchdog and the readers of metrics still hear from the agent.

        Returns early when processes have come or gone, or, where the caller will take them, when
        there are hints: it would return at once again as long as nobody does.
        """
        end, woken = time.monotonic() + seconds, False
        while not self._signals.pending and (left := end - time.monotonic()) > 0:
            self._publish()
            if self._follow() or (hinted and self._has_hints()):
                return
            now = time.monotonic()
            stirred = woken or self._stirred or bool(self._pipeline.targets.waiting)
            nap = self._naps.next(now, stirred, now - self._followed)
            others = min(self._snapshot_due - now, self._notifier.due_seconds())
            if hinted and nap.for_hints:
                if not self._source.wake_for_hints():
                    others = min(others, IDLE_SECONDS)
                elif self._has_hints():  # they came before anybody was to be woken
                    return
            nap_seconds = min(nap.seconds, left, max(0.0, others))
            descriptor = self._source.descriptor() if nap.for_events else None
            woken = self._signals.sleep(nap_seconds, descriptor)

    def _follow(self) -> bool:
        """Take in which processes came and went, in the middle of whatever goes on."""
        now = time.monotonic()
        passed = now - self._followed
        if passed < self._source.poll_seconds:
            return False
        self._stirred = bool(self._pipeline.targets.waiting) or self._have_events()
        if passed < IDLE_SECONDS and not self._stirred:
            return False
        self._followed = now
        changed = self._pipeline.follow_events()
        if changed:
            self._source.watch(target.process for target in self._pipeline.targets)
        return changed

    def _has_hints(self) -> bool:
        if not self._source.has_hints():
            return False
        self._naps.stir(time.monotonic())
        return True

    def _have_events(self) -> bool:
        descriptor = self._source.descriptor()
        return descriptor is not None and bool(select.select([descriptor], [], [], 0)[0])

    def _hints(self) -> list[Hint]:
        return self._source.hints(target.process for target in self._pipeline.targets)

    # --- the kernel module -------------------------------------------------------------------

    def _open_module(self) -> bool:
        """Open the module if it is there; say once when it is not."""
        if self._module:
            return True
        if not Module.is_loaded():
            self._tell_missing("the kernel module is not loaded; waiting for it")
            return False
        try:
            module = Module()
            info = module.info()
        except MergememError as failure:
            self._tell_missing(f"{failure.message} ({failure.hint})")
            return False
        self._module, self._limits = module, info.limits
        self._pipeline.forget_pages()
        self._missing_told = ""
        log.info("module: version %s is loaded", info.module_version)
        self._publish(force=True)
        return True

    def _lose_module(self, failure: MergememError) -> None:
        self._close_module()
        self._pipeline.forget_pages()
        log.warning("module: lost: %s", failure.message)
        self._publish(force=True)

    def _close_module(self) -> None:
        if self._module:
            self._module.close()
        self._module = self._limits = None

    def _tell_missing(self, message: str) -> None:
        if message != self._missing_told:
            self._missing_told = message
            log.warning("module: %s", message)

    # --- policies ----------------------------------------------------------------------------

    def _reload_policies(self) -> None:
        """Read the policies again; when they are wrong, those in force stay so."""
        self._signals.reload = False
        self._notifier.reloading()
        try:
            policies = _load(self._options)
        except MergememError as failure:
            log.error("policy: reload failed, the old ones stay in force:\n%s", failure.message)
            self._reload = replace(
                self._reload, succeeded=False, failures=self._reload.failures + 1
            )
        else:
            self._warn_of_restart(policies)
            self._policies, self._budget = policies, _budget(policies)
            self._pressure.change_settings(policies.agent)
            self._pipeline.change_policies(policies, self._budget)
            self._reload = replace(
                self._reload,
                succeeded=True,
                successes=self._reload.successes + 1,
                succeeded_at=time.time(),
            )
            log.info("policy: reloaded, %d policies", len(policies.policies))
        self._publish(force=True)
        self._notifier.ready()

    def _warn_of_restart(self, policies: PolicySet) -> None:
        old, new = self._policies.agent, policies.agent
        if (old.metrics_address, old.metrics_port) != (new.metrics_address, new.metrics_port):
            log.warning("policy: another metrics address or port takes a restart of the agent")
        if old.hints != new.hints:
            log.warning("policy: switching hints on or off takes a restart of the agent")

    # --- what others see ---------------------------------------------------------------------

    def _publish(self, force: bool = False) -> None:
        """Now and then, heed the host's pressure, and tell metrics and `mergemem status`."""
        self._notifier.alive()
        now = time.monotonic()
        if now < self._snapshot_due and not force:
            return
        self._snapshot_taken, self._snapshot_due = now, now + IDLE_SNAPSHOT_SECONDS
        self._told = self._progress()
        self._budget.set_percent(self._pressure.budget_percent())
        self._snapshot = snapshot = self._take_snapshot()
        self._write_status(snapshot)
        merged = sum(memory.merged_pages for memory in snapshot.memory.values())
        saved_mib = sum(memory.saved_bytes for memory in snapshot.memory.values()) / 2**20
        targets = sum(memory.targets for memory in snapshot.memory.values())
        state = "" if snapshot.module else "no kernel module; "
        self._notifier.status(
            f"{state}{targets} targets, {merged} merged pages, {saved_mib:.0f} MiB saved"
        )

    def _take_snapshot(self) -> Snapshot:
        usage = os.times()
        try:
            info = self._module.info() if self._module else None
            self._limits = info.limits if info else None  # one of them can change at any time
        except MergememError:
            info = None  # unloaded this moment: the next request of the round tells
        return Snapshot(
            agent_version=__version__,
            pid=os.getpid(),
            taken_at=time.time(),
            counts=self._pipeline.counts.copy(),
            memory=self._pipeline.memory(),
            queue=self._pipeline.queue.state(),
            reload=self._reload,
            budget_percent=self._budget.percent,
            pressure=self._pressure.state,
            max_shared_bytes=self._policies.agent.max_shared_bytes,
            user_seconds=usage.user,
            system_seconds=usage.system,
            module=info,
            hints=self._source.state(),
        )

    def _write_status(self, snapshot: Snapshot) -> None:
        """Replace the status file; readers see the old one or the new one, whole."""
        path = self._options.status_file
        fresh = path.with_suffix(".new")
        try:
            path.parent.mkdir(mode=0o755, exist_ok=True)
            fresh.write_text(json.dumps(snapshot.as_dict()), encoding="utf-8")
            fresh.replace(path)
        except OSError as failure:
            log.debug("status: %s cannot be written: %s", path, failure)


def _load(options: Options) -> PolicySet:
    return load(list(options.policy_files) or default_paths())


def _budget(policies: PolicySet) -> Budget:
    return Budget(
        policies.agent.budget_percent,
        {policy.name: policy.budget_percent for policy in policies.policies},
    )


def _parse(arguments: Sequence[str]) -> tuple[Options, bool]:
    parser = argparse.ArgumentParser(
        prog="mergemem agent",
        description="Find equal pages in the processes that the policies choose, and merge them.",
        epilog="SIGHUP reads the policies again; SIGTERM stops the agent. Merged pages stay.",
    )
    parser.add_argument(
        "--policy", type=Path, nargs="+", action="extend", default=[], metavar="FILE",
        help="policy files; default: /etc/mergemem/mergemem.yaml and policy.d/*.yaml beside it",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="stop after N rounds; default: run on"
    )
    parser.add_argument(
        "--status-file", type=Path, default=STATUS_FILE, metavar="FILE",
        help="where `mergemem status` finds the agent; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="log each detail")
    given = parser.parse_args(arguments)
    return Options(tuple(given.policy), given.rounds, given.status_file), given.verbose


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    options, verbose = _parse(arguments)
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(levelname)s %(message)s",
    )
    heap.keep_arrays()
    Agent(options, ProcFs(), Notifier()).run()
    return 0
