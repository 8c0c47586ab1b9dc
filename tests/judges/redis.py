# SPDX-License-Identifier: MIT
"""Redis: it forks to save, and its digests, its replica and its checkers must agree."""

from __future__ import annotations

import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.judges.judge import Judge
from tests.judges.place import Place, Wrong

KEYS = 4000
VALUE_BYTES = 4096
START_SECONDS = 120
# DEBUG POPULATE fills keys so; all that follows must still be there at the end.
VALUES = """
local wrong = 0
for i = 0, tonumber(ARGV[1]) - 1 do
  local value = redis.call('GET', 'known:' .. i)
  local start = 'value:' .. i
  if not value or #value ~= tonumber(ARGV[2]) or value:sub(1, #start) ~= start
     or value:sub(#start + 1):find('[^%z]') then wrong = wrong + 1 end
end
return wrong
"""
SAVING = ("--appendonly", "yes", "--aof-use-rdb-preamble", "yes", "--save", "")


@dataclass(frozen=True)
class Server:
    """One redis-server, on a socket or a port of its own."""

    place: Place
    name: str
    port: int

    @property
    def directory(self) -> Path:
        return self.place.directory / self.name

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        self.directory.mkdir()
        words = ["redis-server", "--port", str(self.port), "--dir", str(self.directory)]
        words += ["--logfile", str(self.directory / "log"), "--enable-debug-command", "yes"]
        words += ["--repl-diskless-sync-delay", "0", *SAVING, *options]
        process = self.place.start(*words, same_addresses=True)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise Wrong(f"redis-server {self.name} does not start:\n{self.log()}")
            time.sleep(0.2)
        return process

    def _answers(self) -> bool:
        log = self.directory / "log"
        return log.exists() and "Ready to accept" in log.read_text(encoding="utf-8")

    def log(self) -> str:
        path = self.directory / "log"
        return path.read_text(encoding="utf-8")[-1500:] if path.exists() else ""

    def ask(self, *words: str) -> str:
        """A command; its reply."""
        return self.place.run("redis-cli", "-p", str(self.port), *words).strip()

    def info(self, field: str) -> str:
        found = re.search(rf"^{field}:(.*?)\r?$", self.ask("INFO", "everything"), re.MULTILINE)
        if not found:
            raise Wrong(f"redis-server {self.name} has no {field}")
        return found[1]

    def wait_for(self, field: str, value: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self.info(field) != value:
            if time.monotonic() > deadline:
                raise Wrong(f"redis-server {self.name}: {field} is not {value}\n{self.log()}")
            time.sleep(0.3)

    def check_values(self) -> None:
        wrong = self.ask("EVAL", VALUES, "0", str(KEYS), str(VALUE_BYTES))
        if wrong != "0":
            count = int(wrong) if wrong.isdigit() else 1
            raise Wrong(f"redis-server {self.name}: {wrong} known values are wrong", count)


def work(place: Place) -> None:
    """A primary and a replica: load, save, compare, reload, check the files."""
    primary, replica = Server(place, "primary", 7401), Server(place, "replica", 7402)
    processes = [primary.start(), replica.start("--replicaof", "127.0.0.1 7401")]
    primary.ask("DEBUG", "POPULATE", str(KEYS), "known", str(VALUE_BYTES))
    # What DEBUG POPULATE does is not replicated; a full synchronisation is.
    replica.ask("REPLICAOF", "NO", "ONE")
    replica.ask("REPLICAOF", "127.0.0.1", "7401")
    first = True
    while first or place.time_left > 0:
        _load_and_compare(place, primary, replica)
        first = False
    for server, process in zip((primary, replica), processes, strict=True):
        server.check_values()
        process.terminate()
        place.finish(process)
        _check_files(place, server)


def _load_and_compare(place: Place, primary: Server, replica: Server) -> None:
    load = [
        "redis-benchmark",
        "-p",
        str(primary.port),
        "-q",
        "-n",
        "1500",
        "-r",
        "500",
        "-d",
        "900",
    ]
    place.run(*load, "-c", "8", "-t", "set,lpush,hset,sadd,zadd,incr,mset")
    primary.ask("BGREWRITEAOF")
    primary.check_values()
    primary.wait_for("aof_rewrite_in_progress", "0")
    primary.wait_for("aof_last_bgrewrite_status", "ok")
    replica.wait_for("master_link_status", "up")
    replica.wait_for("master_repl_offset", primary.info("master_repl_offset"))
    _same(primary.ask("DEBUG", "DIGEST"), replica.ask("DEBUG", "DIGEST"), "primary and replica")
    before = primary.ask("DEBUG", "DIGEST")
    primary.ask("DEBUG", "RELOAD")
    _same(before, primary.ask("DEBUG", "DIGEST"), "before and after a reload")


def _same(one: str, other: str, what: str) -> None:
    if one != other or not re.fullmatch("[0-9a-f]{40}", one):
        raise Wrong(f"digests differ, {what}: {one} and {other}")


def _check_files(place: Place, server: Server) -> None:
    manifest = next((server.directory / "appendonlydir").glob("*.manifest"))
    place.run("redis-check-aof", manifest)
    dumps = [*server.directory.glob("*.rdb"), *server.directory.glob("appendonlydir/*.rdb")]
    if not dumps:
        raise Wrong(f"redis-server {server.name} has saved nothing")
    for dump in dumps:
        place.run("redis-check-rdb", dump)


JUDGES = (
    Judge(
        "redis",
        "digests of primary, replica and reload; redis-check-rdb and -aof",
        work,
        100,
        30,
    ),
)
