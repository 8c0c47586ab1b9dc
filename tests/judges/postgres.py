# SPDX-License-Identifier: MIT
"""PostgreSQL: pgbench on a cluster with page checksums, then amcheck and its own sums."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.judges.judge import Judge
from tests.judges.place import UNPRIVILEGED, Place, Wrong

CLIENTS = 4
START_SECONDS = 120
BALANCES = """
SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)
   AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(delta) FROM pgbench_history)
   AND (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT sum(delta) FROM pgbench_history)
   AND (SELECT count(*) FROM pgbench_history) > 0
   AND (SELECT count(*) FROM pgbench_accounts) = 100000
"""
# Sorting and hashing in private memory, with a result that is known beforehand.
SORT = """
SELECT count(*) = 60000 AND bool_and(right_order) FROM (
  SELECT n >= lag(n, 1, -1) OVER (ORDER BY n) AS right_order
    FROM (SELECT (i * 7919) % 60013 AS n FROM generate_series(1, 60000) AS i) AS numbers
) AS sorted;
"""
SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "shared_buffers": "32MB",
    "work_mem": "16MB",
    "huge_pages": "off",
    "log_min_messages": "error",
    "jit": "off",
}


def work(place: Place) -> None:
    """A cluster, load, checks."""
    data = place.directory / "data"
    sockets = str(place.directory)
    options = ["--no-locale", "--encoding=UTF8", "--auth=trust", "--username=judge", "--no-sync"]
    place.run("initdb", "--data-checksums", *options, "-D", data, user=UNPRIVILEGED)
    connection = ["--host", sockets, "--username", "judge"]
    with _server(place, data, connection):
        place.run("pgbench", *connection, "-i", "-q", "postgres", user=UNPRIVILEGED)
        clients = ["-c", str(CLIENTS), "-j", "2", "-T", str(max(2, round(place.time_left)))]
        script = place.directory / "sort.sql"
        script.write_text(SORT, encoding="utf-8")
        mix = ["-b", "tpcb-like@8", "-b", "select-only@4", "-f", f"{script}@1"]
        place.run("pgbench", *connection, *clients, *mix, "-n", "postgres", user=UNPRIVILEGED)
        for query in (BALANCES, SORT):
            said = place.run("psql", *connection, "-At", "-c", query, "postgres", user=UNPRIVILEGED)
            if said.strip() != "t":
                raise Wrong(f"{query.strip()}\nis not true but {said}")
        check = ["--install-missing", "--heapallindexed", "--parent-check", "postgres"]
        place.run("pg_amcheck", *connection, *check, user=UNPRIVILEGED)
    place.run("pg_checksums", "--check", "-D", data, user=UNPRIVILEGED)


@contextmanager
def _server(place: Place, data: Path, connection: list[str]) -> Iterator[None]:
    """A running server; its end must be in good order, and its log silent."""
    settings = [word for item in SETTINGS.items() for word in ("-c", "=".join(item))]
    log = place.directory / "server.log"
    words = ["exec", "postgres", "-D", str(data), "-k", str(place.directory), *settings]
    command = f'{words[0]} "$@" >"$LOG" 2>&1'
    server = place.start(
        "sh", "-c", command, "sh", *words[1:], user=UNPRIVILEGED, env={"LOG": str(log)}
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (data / "postmaster.pid").exists() or "ready" not in _status(data):
            if server.poll() is not None or time.monotonic() > deadline:
                raise Wrong(f"the server does not start: {log.read_text(encoding='utf-8')}")
            time.sleep(0.2)
        yield
    finally:
        server.terminate()
    place.finish(server)
    said = [line for line in log.read_text(encoding="utf-8").splitlines() if "LOG:" not in line]
    if said:
        raise Wrong("the server's log says:\n" + "\n".join(said[:20]), len(said))


def _status(data: Path) -> str:
    return (data / "postmaster.pid").read_text(encoding="utf-8")


JUDGES = (
    Judge(
        "postgresql",
        "pgbench's balances, amcheck of heaps and indexes, page checksums",
        work,
        100,
        30,
    ),
)
