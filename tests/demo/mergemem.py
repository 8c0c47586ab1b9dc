# SPDX-License-Identifier: MIT
"""What an operator does: the module, the command `mergemem`, the agent and its metrics."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MERGEMEM = (sys.executable, "-m", "mergemem_agent")
MODULE = "mergemem"
METRICS_URL = "http://127.0.0.1:9119/metrics"
READY_LIMIT_SECONDS = 180  # it compiles its BPF program first
STOP_LIMIT_SECONDS = 30
COMMAND_LIMIT_SECONDS = 180


class CommandError(Exception):
    """A command failed, or the agent did."""


def run(*arguments: str) -> str:
    """Run `mergemem …` and return what it printed."""
    return _run([*MERGEMEM, *arguments], f"mergemem {' '.join(arguments)}")


def run_json(*arguments: str) -> Any:
    """The same for a command that prints JSON."""
    return json.loads(run(*arguments))


def load_module() -> None:
    _run(["insmod", os.environ["MERGEMEM_KO"]], "insmod")


def unload_module() -> None:
    _run(["rmmod", MODULE], "rmmod")


def _run(words: Sequence[str], name: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_LIMIT_SECONDS)
    if done.returncode:
        raise CommandError(f"{name}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


@dataclass(frozen=True)
class Stopped:
    """How an agent ended."""

    status: int
    seconds: float
    cpu_seconds: float


class Agent:
    """A running `mergemem agent`, started as an init system starts it."""

    def __init__(self, options: Sequence[str], log: Path) -> None:
        """Start it; wait_until_ready() says when it is at work."""
        self.log = log
        address = log.with_suffix(".notify")
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(address))
        self._ready = threading.Event()
        threading.Thread(target=self._listen, name="notify", daemon=True).start()
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                [*MERGEMEM, "agent", *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | {"NOTIFY_SOCKET": str(address)},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Until the agent says READY=1."""
        deadline = time.monotonic() + READY_LIMIT_SECONDS
        while not self._ready.wait(timeout=0.2):
            self._check_alive()
            if time.monotonic() > deadline:
                raise CommandError(f"the agent was not ready in time:\n{self._said()}")

    def _listen(self) -> None:
        """Read all that the agent notifies: a full socket would make it wait."""
        while lines := self._notify.recv(4096).splitlines():
            if b"READY=1" in lines:
                self._ready.set()

    def cpu_seconds(self) -> float:
        """User and system time so far, of all its threads; its kernel work is in there."""
        self._check_alive()
        stat = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8")
        fields = stat.rpartition(")")[2].split()
        user_ticks, system_ticks = int(fields[11]), int(fields[12])
        return (user_ticks + system_ticks) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> Stopped:
        """SIGTERM, and the kernel's account of what it used in all."""
        started = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        while True:
            pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
            seconds = time.monotonic() - started
            if pid:
                break
            if seconds > STOP_LIMIT_SECONDS:
                raise CommandError(f"the agent did not stop:\n{self._said()}")
            time.sleep(0.02)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        return Stopped(self._process.returncode, seconds, usage.ru_utime + usage.ru_stime)

    def _check_alive(self) -> None:
        if self._process.poll() is not None:
            raise CommandError(f"the agent ended with {self._process.returncode}:\n{self._said()}")

    def _said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def scrape() -> dict[str, float]:
    """GET /metrics: samples by name and labels, as Prometheus writes them."""
    with urllib.request.urlopen(METRICS_URL, timeout=30) as response:
        text = response.read().decode()
    samples = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            samples[name] = float(value)
    return samples


def hints() -> dict[str, Any]:
    """Where the agent's hints come from, and how many there were."""
    metrics = scrape()
    (source,) = [name for name in metrics if name.startswith("mergemem_hints_source{")]
    lost = [value for name, value in metrics.items() if name.startswith("mergemem_hints_lost")]
    return {
        "source": source.split('"')[1],
        "faults": metrics['mergemem_hints_faults_total{kind="first_touch"}'],
        "events": metrics["mergemem_hints_events_total"],
        "lost": sum(lost),
    }
