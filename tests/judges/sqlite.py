# SPDX-License-Identifier: MIT
"""SQLite: several processes write one database, and it checks itself.

Every row says what it must hold: its payload follows from its number, and SQL can tell.
"""

from __future__ import annotations

from pathlib import Path

from tests.judges.judge import Judge
from tests.judges.place import Place, Wrong

WRITERS = 3
ROWS_A_ROUND = 300
TIMEOUT_MS = 100_000

# hex() of a product is text of the number; printf pads it to some hundred bytes.
PAYLOAD = "printf('%0400d', {number} * 7919 % 1000003)"

MAKE = f"""
PRAGMA journal_mode = WAL;
CREATE TABLE item (number INTEGER PRIMARY KEY, writer INTEGER, payload TEXT);
CREATE INDEX item_payload ON item (payload);
CREATE TABLE note (number INTEGER PRIMARY KEY, payload TEXT);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000)
INSERT INTO note SELECT i, {PAYLOAD.format(number="i")} FROM n;
"""

# In memory as well as in the file: the same rows in each process, so equal pages.
COPY = """
.timeout {timeout}
PRAGMA cache_size = 8000;
PRAGMA temp_store = MEMORY;
CREATE TEMP TABLE mine AS SELECT * FROM note;
CREATE INDEX temp.mine_payload ON mine (payload);
"""

ROUND = f"""
BEGIN IMMEDIATE;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ROWS_A_ROUND})
INSERT INTO item SELECT {{first}} + i, {{writer}}, {PAYLOAD.format(number="({first} + i)")} FROM n;
UPDATE item SET payload = payload WHERE writer = {{writer}} AND number % 7 = 0;
COMMIT;
SELECT 'wrong ' || count(*) FROM mine WHERE payload <> {PAYLOAD.format(number="number")};
SELECT 'wrong ' || count(*) FROM item WHERE payload <> {PAYLOAD.format(number="number")};
"""

CHECK = f"""
PRAGMA integrity_check;
PRAGMA quick_check;
SELECT 'wrong ' || count(*) FROM item WHERE payload <> {PAYLOAD.format(number="number")};
SELECT 'wrong ' || count(*) FROM note WHERE payload <> {PAYLOAD.format(number="number")};
SELECT 'rows ' || count(*) FROM item;
SELECT 'rows ' || count(*) FROM item INDEXED BY item_payload WHERE payload > '';
"""


def work(place: Place) -> None:
    """Writers side by side, batch after batch, then the check."""
    database = place.directory / "judge.db"
    place.run("sqlite3", "-bail", database, say=MAKE)
    rounds = 0
    while place.time_left > 0 or not rounds:
        _write(place, database, rounds)
        rounds += 1
    lines = place.run("sqlite3", "-bail", database, say=CHECK).splitlines()
    rows = rounds * ROUNDS_A_BATCH * WRITERS * ROWS_A_ROUND
    expected = ["ok", "ok", "wrong 0", "wrong 0", f"rows {rows}", f"rows {rows}"]
    if lines != expected:
        raise Wrong(f"the check says {lines[:20]}, not {expected}", abs(len(lines) - 5))


ROUNDS_A_BATCH = 4


def _write(place: Place, database: Path, batch: int) -> None:
    scripts = []
    for writer in range(WRITERS):
        script = COPY.format(timeout=TIMEOUT_MS)
        for number in range(ROUNDS_A_BATCH):
            position = (batch * ROUNDS_A_BATCH + number) * WRITERS + writer
            script += ROUND.format(first=position * ROWS_A_ROUND, writer=writer)
        path = place.directory / f"writer-{writer}.sql"
        path.write_text(script, encoding="utf-8")
        scripts.append(path)
    programs = [
        place.start("sqlite3", "-bail", database, f".read {script}", same_addresses=True)
        for script in scripts
    ]
    for program in programs:
        lines = place.finish(program).splitlines()
        if lines != ["wrong 0"] * (2 * ROUNDS_A_BATCH):
            raise Wrong(f"a writer says {lines[:20]}")


JUDGES = (Judge("sqlite", "integrity_check, and each row says what it must hold", work, 100, 20),)
