# SPDX-License-Identifier: MIT
"""Metrics: what they say of a snapshot, whether promtool accepts them, and how they are served."""

import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mergemem_agent.contract import Feature, Result
from mergemem_agent.counts import Counts, PolicyCounts, PolicyMemory, ReloadState, Snapshot
from mergemem_agent.error import MergememError
from mergemem_agent.info import Counters, Info, Limits, Totals
from mergemem_agent.metrics import METRICS, MetricsServer
from mergemem_agent.pressure import Level, PressureState
from mergemem_agent.scan import QueueState

DOCUMENT = Path(__file__).parents[2] / "docs/metrics.md"

INFO = Info(
    contract_version=2,
    module_version="0.1.0",
    features=Feature(0),
    limits=Limits(1024, 4000, 16384, 1 << 20, 0),
    counters=Counters(1, 2, 3, 4, 5, 6, dict.fromkeys(Result, 0), 7, 8),
    totals=Totals(shared_pages=10, shared_mappings=35),
)
SNAPSHOT = Snapshot(
    agent_version="0.1.0",
    pid=4711,
    taken_at=1.7e9,
    counts=Counts(
        policies={"web": PolicyCounts(100, 60, 30, 80, 4, 1.5, 11, 12, 13)},
        nominated=Counter({"user+cgroup": 70}),
        results=Counter({Result.SUCCESS: 60, Result.NOTEQUAL: 10}),
        freed_pages=45,
        errors=Counter({"scan": 2}),
        cpu_seconds={"scan": 1.25},
    ),
    memory={"web": PolicyMemory(3, 90, 60, 122880.0, 122880.0, 1 << 20, 7, 512)},
    queue=QueueState(regions=20, due=5, dropped=0),
    reload=ReloadState(succeeded=True, successes=1, succeeded_at=1.7e9),
    budget_percent=5.0,
    pressure=PressureState(Level.MEMORY, 12.5, 3.0),
    max_shared_bytes=1 << 30,
    user_seconds=1.0,
    system_seconds=2.0,
    module=INFO,
)


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    opened = MetricsServer("127.0.0.1", 0, lambda: SNAPSHOT)
    yield opened
    opened.close()


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as reply:
        text: str = reply.read().decode()
        return text


def samples(text: str) -> dict[str, float]:
    return {
        sample.name + str(dict(sorted(sample.labels.items())) or ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_values(server: MetricsServer) -> None:
    found = samples(scrape(server.port))
    expected = {
        "mergemem_module_loaded": 1,
        "mergemem_scanned_pages_total{'policy': 'web'}": 100,
        "mergemem_checksummed_pages_total{'policy': 'web'}": 30,
        "mergemem_nominated_pages_total{'domain': 'user+cgroup'}": 70,
        "mergemem_merged_pages_total{'result': 'success'}": 60,
        "mergemem_merged_pages_total{'result': 'alone'}": 0,
        "mergemem_freed_pages_total": 45,
        "mergemem_unmerged_pages_total": 4,
        "mergemem_shared_pages": 10,
        "mergemem_shared_mappings": 35,
        "mergemem_shared_saved_bytes": 25 * 4096,
        "mergemem_saved_bytes{'policy': 'web'}": 122880,
        "mergemem_zero_pages{'policy': 'web'}": 7,
        "mergemem_huge_pages{'policy': 'web'}": 512,
        "mergemem_cpu_seconds_total{'mode': 'user'}": 1,
        "mergemem_cpu_seconds_total{'mode': 'system'}": 2,
        "mergemem_budget_ratio": 0.05,
        "mergemem_pressure_ratio{'resource': 'memory'}": 0.125,
        "mergemem_scan_queue_due_regions": 5,
        "mergemem_errors_total{'stage': 'scan'}": 2,
        "mergemem_policy_reload_success": 1,
        "mergemem_build_info{'contract_version': '3', 'version': '0.1.0'}": 1,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_without_a_module_its_figures_are_missing_not_zero() -> None:
    server = MetricsServer("127.0.0.1", 0, lambda: replace(SNAPSHOT, module=None))
    found = samples(scrape(server.port))
    server.close()
    assert found["mergemem_module_loaded"] == 0
    assert "mergemem_shared_pages" not in found
    assert found["mergemem_scanned_pages_total{'policy': 'web'}"] == 100


def test_promtool_accepts_them(server: MetricsServer) -> None:
    promtool = shutil.which("promtool")
    assert promtool, "promtool comes with Debian's package prometheus"
    text = scrape(server.port)
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_labels_never_name_a_process() -> None:
    assert {label for metric in METRICS for label in metric.labels} <= {
        "policy", "domain", "result", "stage", "outcome", "part", "mode", "resource", "version",
        "contract_version", "source", "reason", "kind",
    }  # fmt: skip


def test_a_client_that_says_nothing_delays_no_other(server: MetricsServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as silent:
        assert "mergemem_build_info" in scrape(server.port)
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):  # it would be at its end, had we waited for it
            silent.recv(1)


def test_the_server_sleeps_until_somebody_asks(server: MetricsServer) -> None:
    status = Path(f"/proc/self/task/{server._thread.native_id}/status")

    def wakes_up() -> bool:
        before = status.read_text().partition("ctxt_switches")[2]
        time.sleep(0.7)
        return status.read_text().partition("ctxt_switches")[2] != before

    scrape(server.port)
    deadline = time.monotonic() + 20
    while wakes_up():
        assert time.monotonic() < deadline, "it does not come to rest"


def test_nobody_is_served_after_the_end() -> None:
    server = MetricsServer("127.0.0.1", 0, lambda: SNAPSHOT)
    server.close()
    assert not server._thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))


def test_a_port_in_use_is_told_with_what_to_do(server: MetricsServer) -> None:
    # Listening twice must fail although SO_REUSEADDR is set.
    with pytest.raises(MergememError, match=f"port {server.port}") as failure:
        MetricsServer("127.0.0.1", server.port, lambda: SNAPSHOT)
    assert "policy file" in failure.value.hint


def test_it_listens_where_it_was_told_and_nowhere_else() -> None:
    server = MetricsServer("127.0.0.2", 0, lambda: SNAPSHOT)
    try:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), timeout=5)
    finally:
        server.close()


def test_the_document_lists_every_metric_with_its_sentence() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", DOCUMENT.read_text(), re.M)
    expected = []
    for metric in METRICS:
        kind = "counter" if "Counter" in metric.kind.__name__ else "gauge"
        name = metric.name + "_total" if kind == "counter" else metric.name
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "-"
        expected.append((name, kind, labels, metric.sentence))
    assert rows == expected
