# SPDX-License-Identifier: MIT
"""The soak's report: nothing that was wrong, and nothing that did not run, is left out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.soak import counters, leaks, plugin, report
from tests.soak.journal import Journal
from tests.soak.report import Boot

TESTS = ["tests/kernel/test_a.py::test_one", "tests/kernel/test_a.py::test_two"]
SETTINGS: dict[str, Any] = {"cpus": 4}
WELL = Boot(60.0, (), "", "")


def ended(name: str, outcome: str = "passed", text: str = "") -> dict[str, Any]:
    values = {"id": name, "round": 1, "outcome": outcome, "seconds": 1.5, "assertions": 3}
    return values | {"text": text}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """A soak in which all went well."""
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("guest", release="6.1-debug", cpus=4)
    journal.write("judges", names=["sqlite"])
    journal.write("collected", round=1, tests=TESTS)
    for name in TESTS:
        journal.write("begin", id=name, round=1)
        journal.write("test", **ended(name))
    journal.write("judge-begin", name="sqlite")
    journal.write("judge", name="sqlite", status=0, verdicts=[{"verdict": "right", "merged": 9}])
    journal.write("counters", before={}, after={}, astray={})
    journal.write("page_owner", leaks=[])
    journal.write("kmemleak", leaks=[])
    return journal


def test_clean(journal: Journal) -> None:
    made = report.make(journal, [WELL], SETTINGS)
    assert made["clean"]
    assert made["not_run"] == []
    assert made["checks"] == {"tests": 2, "assertions": 6, "judges": 1, "leak_scans": 2}
    assert "the soak is clean" in report.summary(made)


@pytest.mark.parametrize(
    ("event", "values"),
    [
        ("test", ended(TESTS[0], "failed", "(call) assert 1 == 2")),
        ("judge", {"name": "sqlite", "status": 1, "verdicts": []}),
        ("counters", {"before": {}, "after": {}, "astray": {"nr_anon_pages": "9 instead of 1"}}),
        ("page_owner", {"leaks": ["Page allocated via order 0"]}),
        ("kmemleak", {"leaks": ["unreferenced object 0x1"]}),
        ("broken", {"what": "pytest ended with status 3"}),
    ],
)
def test_one_thing_wrong(journal: Journal, event: str, values: dict[str, Any]) -> None:
    journal.write(event, **values)
    made = report.make(journal, [WELL], SETTINGS)
    assert not made["clean"]
    assert "THE SOAK HAS FINDINGS" in report.summary(made)


def test_kernel_log(journal: Journal) -> None:
    made = report.make(journal, [Boot(60.0, ("BUG: KASAN",), "around", "")], SETTINGS)
    assert not made["clean"]
    assert made["log_findings"] == ["BUG: KASAN"]


def test_nothing_ran(tmp_path: Path) -> None:
    made = report.make(Journal(tmp_path / "journal.jsonl"), [WELL], SETTINGS)
    assert not made["clean"]
    assert [entry["name"] for entry in made["not_run"]] == ["judges"]


def test_what_did_not_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    names = [f"tests/kernel/test_a.py::test_{word}" for word in ("skipped", "lost", "late")]
    journal.write("judges", names=["redis"])
    journal.write("collected", round=1, tests=names)
    journal.write("begin", id=names[0], round=1)
    journal.write("test", **ended(names[0], "skipped", "no second node"))
    journal.write("begin", id=names[1], round=1)
    made = report.make(journal, [Boot(9.0, (), "", "lost")], SETTINGS)
    assert {entry["name"]: entry["reason"] for entry in made["not_run"]} == {
        names[0]: "skipped: no second node",
        names[1]: "the guest was lost while it ran",
        names[2]: "the time was up",
        "judge redis": "the time was up",
    }
    assert not made["clean"]


def test_judges_that_came_to_nothing(journal: Journal) -> None:
    """Time that was too short is no finding, and is told; what is wrong is wrong all the same."""
    few = {"status": 1, "verdicts": [{"verdict": "too few merges", "merged": 3}], "seconds": 9}
    journal.write("judges", names=["sqlite", "redis", "stress-vm"])
    journal.write("judge", name="redis", status=None, verdicts=[], seconds=605.2)
    journal.write("judge", name="stress-vm", **few)
    made = report.make(journal, [WELL], SETTINGS)
    assert made["clean"]
    assert made["checks"]["judges"] == 1
    assert {entry["name"]: entry["reason"] for entry in made["not_run"]} == {
        "judge redis": "cut off after 605 s",
        "judge stress-vm": "too few merges in 9 s",
    }
    journal.write("judge", name="stress-vm", **(few | {"verdicts": []}))
    assert not report.make(journal, [WELL], SETTINGS)["clean"]


def test_a_torn_line_is_the_last(journal: Journal) -> None:
    before = len(journal.read())
    with open(journal.path, "a", encoding="utf-8") as file:
        file.write('{"event": "test", "id": "tests/ker')
    assert len(journal.read()) == before


def test_pages_of_an_unloaded_module() -> None:
    symbols = leaks.Symbols(
        "ffffffffc0001000 t mergemem_shared_create\t[mergemem]\nffffffff81000000 T _text\n"
    )
    record = (
        "Page allocated via order 0, mask 0xcc0(GFP_KERNEL), pid 9, tgid 9 (python3)\n"
        "PFN 5 type Unmovable Block 0 type Movable Flags 0x1ffff0000000{}(node=0)\n"
        " get_page_from_freelist+0x1/0x2\n 0xffffffffc0001042\n"
    )
    assert leaks.is_leaked(record.format(""))
    assert not leaks.is_leaked(record.format("200(slab"))
    assert not leaks.is_leaked(record.format("").replace("0xffffffffc0001042", "vm_brk+0x1"))
    # On behalf of the module, but not for it.
    stack = " get_page_from_freelist+0x1/0x2\n"
    assert not leaks.is_leaked(record.format("").replace(stack, f"{stack} arm_kprobe+0x1/0x2\n"))
    assert "mergemem_shared_create+0x42 [mergemem]" in symbols.name(record)
    assert "0xffffffffc0800000 (unloaded)" in symbols.name("0xffffffffc0800000")


def test_counters() -> None:
    before = {"nr_anon_pages": 10000, "nr_isolated_anon": 0, "cgroups": 2, "negative": 0}
    assert counters.astray(before, before | {"nr_anon_pages": 10500}) == {}
    after = {"nr_anon_pages": 12000, "nr_isolated_anon": 1, "cgroups": 3, "negative": 1}
    assert set(counters.astray(before, after)) == set(before)


def test_important_files_come_first() -> None:
    names = ["test_fault_injection.py", "test_agent.py", "test_load.py", "test_swap.py"]
    assert sorted(names, key=plugin.rank) == list(reversed(names))
