# SPDX-License-Identifier: MIT
"""A latency-sensitive server, and what its clients feel: Redis and redis-benchmark."""

from __future__ import annotations

import csv
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.bench.race.workload import WorkloadError, launcher
from tests.judges.place import Place

PORT = 7411
KEYS = 2000
VALUE_BYTES = 4096
CLIENTS = 2
REQUESTS = 2500
START_SECONDS = 60
COMMON = ("-p", str(PORT))
LOAD = (
    "redis-benchmark", *COMMON, "--csv", "-c", str(CLIENTS), "-r", str(KEYS), "-d",
    str(VALUE_BYTES),
)  # fmt: skip


class Server:
    """One redis-server with known content, asked without a pause."""

    def __init__(self, directory: Path, opt_in: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._place = Place(directory, START_SECONDS)
        log = directory / "redis.log"
        log.unlink(missing_ok=True)
        # No program opts another in by madvise(): on kernels without the prctl KSM does not look
        # at the server's memory, only at that of the processes beside it.
        words = launcher(opt_in) if opt_in == "prctl" else ()
        self._server = self._place.start(
            *words, "redis-server", "--port", str(PORT), "--save", "", "--logfile", str(log),
            "--enable-debug-command", "yes",
        )  # fmt: skip
        self._wait_for(log)
        self._place.run(*LOAD, "-t", "set", "-n", str(KEYS * 3 // 2))
        self._digest = self._ask("DEBUG", "DIGEST")
        self._load: subprocess.Popen[bytes] | None = None
        self.latencies: list[dict[str, float]] = []

    @property
    def pid(self) -> int:
        return self._server.pid

    def tick(self) -> None:
        """Keep the clients asking; note what they felt when a batch of requests is done."""
        if self._load and self._load.poll() is not None:
            self._note()
        if not self._load:
            self._load = self._place.start(*LOAD, "-t", "get", "-n", str(REQUESTS))

    def stop(self) -> dict[str, Any]:
        """Let the last batch end; compare all data with what was loaded; end the server."""
        if self._load:
            self._note()
        if self._ask("DEBUG", "DIGEST") != self._digest:
            raise WorkloadError("the server's data are not what they were")
        self._server.terminate()
        self._place.finish(self._server)
        return {"latencies": self.latencies}

    def _note(self) -> None:
        assert self._load
        output = self._place.finish(self._load)
        self._load = None
        found = next(row for row in csv.DictReader(output.splitlines()) if row["test"] == "GET")
        self.latencies.append(
            {
                "p50_ms": float(found["p50_latency_ms"]),
                "p99_ms": float(found["p99_latency_ms"]),
                "max_ms": float(found["max_latency_ms"]),
                "requests_per_second": float(found["rps"]),
            }
        )

    def _ask(self, *words: str) -> str:
        return self._place.run("redis-cli", *COMMON, *words).strip()

    def _wait_for(self, log: Path) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not log.exists() or "Ready to accept" not in log.read_text(encoding="utf-8"):
            if self._server.poll() is not None or time.monotonic() > deadline:
                raise WorkloadError("redis-server does not start")
            time.sleep(0.1)
