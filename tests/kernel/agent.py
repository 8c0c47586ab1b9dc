# SPDX-License-Identifier: MIT
"""The command `mergemem` as its users run it, and a running agent with its metrics."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tests.kernel.sharing import wait_until

CHECKOUT = Path(__file__).parents[2]
PORT = 9719
SAMPLE = re.compile(r"^(\w+)(?:{(.*)})? (\S+)$", re.MULTILINE)


def mergemem(*words: object, status: int = 0) -> str:
    """Run a command to its end; what it printed."""
    command = [sys.executable, "-m", "mergemem_agent", *map(str, words)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def complaint(*words: object, status: int = 1) -> str:
    """Run a command that fails; what it said on stderr."""
    command = [sys.executable, "-m", "mergemem_agent", *map(str, words)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stderr


class Agent:
    """`mergemem agent` with one policy file, from its start to a clean stop."""

    def __init__(
        self,
        directory: Path,
        policies: str,
        budget: str = "100%",
        settings: str = "",
        hints: str = "none",
        rescan: str = "1s",
        prefix: Sequence[str] = (),
    ) -> None:
        self.policy_file = directory / "policies.yaml"
        self.log_file = directory / "agent.log"
        self.status_file = directory / "status.json"
        # Tests keep the guest's CPUs busy: that must not slow the agent down unasked.
        self._settings = f'budget: "{budget}", ' + (settings or 'cpu_pressure: "100%"')
        # Compiling the BPF program takes longer than most tests: only where it is what is tested.
        self._settings += f', hints: {hints}, rescan: "{rescan}"'
        self._prefix = prefix  # of its command line
        self.write_policies(policies)

    def write_policies(self, policies: str) -> None:
        """Replace the policy file."""
        settings = f"agent: {{{self._settings}, metrics_port: {PORT}}}\n"
        self.policy_file.write_text(settings + policies)

    def __enter__(self) -> Agent:
        words = [*self._prefix, sys.executable, "-m", "mergemem_agent", "agent"]
        words += ["--policy", str(self.policy_file), "--status-file", str(self.status_file)]
        with self.log_file.open("w") as log:
            self._process = subprocess.Popen(words, cwd=CHECKOUT, stderr=log)
        self.pid = self._process.pid
        wait_until(self._serves_metrics, "the agent serves metrics")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind:
            print(self.log)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    @property
    def log(self) -> str:
        """What it has said so far."""
        return self.log_file.read_text()

    def metrics(self) -> dict[str, float]:
        """All samples of a scrape, by name and labels as they are written."""
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        return {
            f"{name}{{{labels}}}" if labels else name: float(value)
            for name, labels, value in SAMPLE.findall(text)
        }

    def reload(self) -> None:
        """SIGHUP."""
        os.kill(self.pid, signal.SIGHUP)

    def stop(self) -> float:
        """SIGTERM; how many seconds it took to end, with status 0."""
        started = time.monotonic()
        self._process.terminate()
        assert self._process.wait(120) == 0, self.log
        return time.monotonic() - started

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def cpu_seconds(self) -> float:
        """User and system time, from /proc/PID/stat."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _serves_metrics(self) -> bool:
        assert self._process.poll() is None, f"the agent has ended\n{self.log}"
        try:
            return "mergemem_build_info" in str(self.metrics())
        except OSError:
            return False
