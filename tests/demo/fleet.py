# SPDX-License-Identifier: MIT
"""Gunicorn with a preloaded application, in a control group, as an ordinary user.

Everything is as an init system would do it: the master is exec'ed as that user (so its processes
are dumpable, where a process that changes its own user is not), in a control group of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
CGROUP = Path("/sys/fs/cgroup/system.slice/shop.service")
USER_ID = 1000
WORKERS = 4
ADDRESS = ("127.0.0.1", 8000)
# The user need not be able to look into the checkout's parent directories.
BOUND_CHECKOUT = Path("/run/shop")
START_LIMIT_SECONDS = 120


class FleetError(Exception):
    """Gunicorn did not do as it should; its log says why."""


@dataclass(frozen=True)
class Fleet:
    """A running gunicorn: a master and its workers."""

    master: subprocess.Popen[bytes]
    log: Path

    @property
    def workers(self) -> tuple[int, ...]:
        """The process ids of the workers, oldest first."""
        pid = self.master.pid
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
        except FileNotFoundError:
            raise FleetError(f"gunicorn has gone:\n{self.log.read_text()}") from None
        return tuple(map(int, children.split()))

    @property
    def pids(self) -> tuple[int, ...]:
        return (self.master.pid, *self.workers)

    def stop(self) -> None:
        """End it; a fleet that does not end in time is a failure."""
        self.master.send_signal(signal.SIGTERM)
        status = self.master.wait(timeout=60)
        if status:
            raise FleetError(f"gunicorn ended with {status}:\n{self.log.read_text()}")


def python() -> str:
    """The interpreter as the user sees it; its own path may lie where the user must not look."""
    return str(BOUND_CHECKOUT / Path(sys.prefix).relative_to(CHECKOUT) / "bin/python")


def command() -> list[str]:
    """What starts the fleet, as its operator would write it."""
    words = [python(), str(Path(python()).with_name("gunicorn")), "--preload"]
    words += ["--workers", str(WORKERS), "--worker-class", "sync"]
    words += ["--config", "python:tests.demo.gunicorn_settings"]
    return [*words, "tests.demo.application:application"]


def start(log: Path) -> Fleet:
    """Start the fleet and wait until all workers are there."""
    BOUND_CHECKOUT.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", CHECKOUT, BOUND_CHECKOUT], check=True)
    CGROUP.mkdir(parents=True, exist_ok=True)
    join = f'echo $$ >{CGROUP}/cgroup.procs && cd {BOUND_CHECKOUT} && exec "$@"'
    user = ["setpriv", f"--reuid={USER_ID}", f"--regid={USER_ID}", "--clear-groups", "--"]
    environment = {
        "PATH": os.environ["PATH"],
        "LANG": "C.UTF-8",
        "HOME": "/nonexistent",
        "PYTHONPATH": str(BOUND_CHECKOUT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with open(log, "wb") as output:
        master = subprocess.Popen(
            ["/bin/sh", "-c", join, "sh", *user, *command()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
        )
    fleet = Fleet(master, log)
    deadline = time.monotonic() + START_LIMIT_SECONDS
    while len(fleet.workers) < WORKERS:
        if master.poll() is not None or time.monotonic() > deadline:
            raise FleetError(f"gunicorn did not start:\n{log.read_text()}")
        time.sleep(0.2)
    return fleet
