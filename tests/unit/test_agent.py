# SPDX-License-Identifier: MIT
"""The agent as a process, without the kernel module: start, reload, stop, what it tells."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mergemem_agent import status
from mergemem_agent.cli import main

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 60.0

GOOD = """\
agent:
  metrics_port: {port}
policies:
  - name: {name}
    select:
      user: root
"""

pytestmark = pytest.mark.skipif(
    Path("/sys/module/mergemem").exists(), reason="the kernel module is loaded: see tests/kernel"
)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


class RunningAgent:
    """An agent, its policy file, its service manager and its log."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.policy = directory / "policy.yaml"
        self.status = directory / "status.json"
        self.log = directory / "log"
        self.write_policy("first")
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._manager.bind(str(directory / "notify"))
        self._manager.setblocking(False)
        self.told: list[str] = []
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mergemem_agent", "agent", "--policy", str(self.policy),
                 "--status-file", str(self.status)],
                cwd=ROOT, stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": str(directory / "notify"),
                     "WATCHDOG_USEC": "100000"},
            )  # fmt: skip

    def write_policy(self, name: str) -> None:
        self.policy.write_text(GOOD.format(port=self.port, name=name))

    def listen(self) -> list[str]:
        try:
            while True:
                self.told += self._manager.recv(4096).decode().split("\n")
        except BlockingIOError:
            return self.told

    def metric(self, name: str) -> float | None:
        url = f"http://127.0.0.1:{self.port}/metrics"
        with urllib.request.urlopen(url, timeout=PATIENCE_SECONDS) as reply:
            lines = reply.read().decode().splitlines()
        values = [line.rsplit(" ", 1)[1] for line in lines if line.startswith(name + " ")]
        return float(values[0]) if values else None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._manager.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[RunningAgent]:
    running = RunningAgent(tmp_path)
    wait_until(lambda: "READY=1" in running.listen() or running.process.poll() is not None)
    assert running.process.poll() is None, running.log.read_text()
    yield running
    running.close()


def test_without_the_module_it_says_so_once_and_serves_metrics(agent: RunningAgent) -> None:
    assert agent.metric("mergemem_module_loaded") == 0
    assert agent.metric("mergemem_policy_reload_success") == 1
    assert agent.metric("mergemem_shared_pages") is None
    wait_until(lambda: agent.listen().count("WATCHDOG=1") >= 3)
    assert agent.log.read_text().count("not loaded") == 1
    assert any(line.startswith("STATUS=no kernel module") for line in agent.told)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_cleanly(agent: RunningAgent, number: signal.Signals) -> None:
    agent.process.send_signal(number)
    assert agent.process.wait(timeout=PATIENCE_SECONDS) == 0
    assert "STOPPING=1" in agent.listen()
    assert not agent.status.exists()


def test_a_good_reload(agent: RunningAgent) -> None:
    agent.write_policy("second")
    agent.process.send_signal(signal.SIGHUP)
    wait_until(lambda: agent.listen().count("READY=1") == 2)
    order = [line for line in agent.told if line.split("=")[0] in ("READY", "RELOADING")]
    assert order == ["READY=1", "RELOADING=1", "READY=1"]
    assert any(line.startswith("MONOTONIC_USEC=") for line in agent.told)
    assert agent.metric("mergemem_policy_reload_success") == 1
    # The targets follow with the next look at /proc.
    wait_until(lambda: agent.metric('mergemem_targets{policy="first"}') is None)
    assert agent.metric('mergemem_targets{policy="second"}') is not None


def test_a_bad_reload_keeps_the_old_policies_and_says_so(agent: RunningAgent) -> None:
    agent.policy.write_text("policies:\n  - nam: x\n")
    agent.process.send_signal(signal.SIGHUP)
    wait_until(lambda: agent.listen().count("READY=1") == 2)
    assert agent.metric("mergemem_policy_reload_success") == 0
    assert agent.metric('mergemem_policy_reloads_total{result="failure"}') == 1
    assert agent.metric('mergemem_targets{policy="first"}') is not None
    log = agent.log.read_text()
    assert "the old ones stay in force" in log
    assert f"{agent.policy}:2:" in log
    agent.write_policy("third")
    agent.process.send_signal(signal.SIGHUP)
    wait_until(lambda: agent.listen().count("READY=1") == 3)
    assert agent.metric("mergemem_policy_reload_success") == 1


def test_status_tells_of_the_agent(agent: RunningAgent, capsys: pytest.CaptureFixture[str]) -> None:
    wait_until(agent.status.exists)
    assert status.main(["--json", "--status-file", str(agent.status)]) == 1  # no module
    told = json.loads(capsys.readouterr().out)
    assert told["module"] is None
    assert told["agent"]["pid"] == agent.process.pid
    assert set(told["agent"]["memory"]) == {"first"}
    assert set(told["agent"]["counts"]["results"]) <= {"success"}
    assert status.main(["--status-file", str(agent.status)]) == 1
    lines = capsys.readouterr().out
    assert "modprobe mergemem" in lines
    assert "first" in lines


def test_status_without_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--status-file", str(tmp_path / "none")]) == 1
    lines = capsys.readouterr().out
    assert "modprobe mergemem" in lines
    assert "systemctl start mergemem" in lines


def test_status_of_an_agent_that_died(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "status.json"
    file.write_text(json.dumps({"taken_at": 0.0, "pid": 4711}))
    assert main(["status", "--status-file", str(file)]) == 1
    assert "no sign of life" in capsys.readouterr().out
    file.write_text("{")
    assert main(["status", "--status-file", str(file)]) == 1
    assert "cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["merge", "unmerge"])
def test_one_shot_commands_say_what_is_missing(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(os.getpid())]) == 1
    assert "modprobe mergemem" in capsys.readouterr().err


def test_wrong_policies_at_the_start_are_fatal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("policies: 3\n")
    assert main(["agent", "--policy", str(wrong)]) == 1
    assert f"{wrong}:1:" in capsys.readouterr().err
