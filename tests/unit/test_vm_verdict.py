# SPDX-License-Identifier: MIT
"""Verdicts: a run is a success only when everything about it is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.vm import build, guest, junit, suite
from tests.vm.kernels import Skip
from tests.vm.steps import StepFailed


def result(status: int = 0, findings: tuple[str, ...] = ()) -> guest.Result:
    return guest.Result(status, findings, 1.0, "tcg", "6.1", "6.1.0-1-amd64", Path("run"))


def test_success() -> None:
    assert result().check() == result()


def test_a_failed_command_keeps_its_status() -> None:
    with pytest.raises(guest.CommandFailed) as failure:
        result(status=42).check()
    assert failure.value.exit_status == 42


def test_findings_fail_a_command_that_succeeded() -> None:
    with pytest.raises(guest.KernelLogFindings, match="BUG: planted"):
        result(findings=("BUG: planted",)).check()


def test_verdicts_are_told_apart_by_their_status() -> None:
    verdicts = (guest.KernelLogFindings, guest.GuestLost, guest.GuestTimeout, guest.CommandFailed)
    assert len({verdict.exit_status for verdict in verdicts}) == len(verdicts)
    assert all(verdict.exit_status for verdict in verdicts)


@pytest.mark.parametrize(
    "word", ["plain", "two words", "$HOME `id` 'x' \"y\"", "new\nline", "ä;&|"]
)
def test_words_reach_the_command_unchanged(tmp_path: Path, word: str) -> None:
    script = tmp_path / "command"
    guest._write_command(script, ["printf", "%s|%s", word, "end"], {"W": word}, tmp_path)
    assert subprocess.run(["sh", script], stdout=subprocess.PIPE).stdout.decode() == f"{word}|end"
    guest._write_command(script, 'printf "%s" "$W"; exit 7', {"W": word}, tmp_path)
    done = subprocess.run(["sh", script], stdout=subprocess.PIPE)
    assert (done.stdout.decode(), done.returncode) == (word, 7)


PYTEST_REPORT = """<?xml version="1.0"?><testsuites><testsuite name="pytest" errors="1"
failures="2" skipped="3" tests="10" time="0.1"></testsuite></testsuites>"""


def test_counts_of_a_pytest_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(PYTEST_REPORT)
    assert str(junit.read(report)) == "4 passed, 3 failed, 3 skipped"


def test_a_missing_or_broken_report_counts_nothing(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    assert junit.read(report) == junit.Counts()
    report.write_text(PYTEST_REPORT[:60])
    assert junit.read(report) == junit.Counts()


def test_own_reports_are_read_back(tmp_path: Path) -> None:
    report = tmp_path / "new/report.xml"
    junit.write(report, "lint", [("a", 0.1, None), ("b", 0.2, "wrong \x1b[1m<&>\nsecond line")])
    assert junit.read(report) == junit.Counts(passed=1, failed=1)


SKIPS = """<?xml version="1.0"?><testsuites><testsuite name="pytest" skipped="3" tests="4">
<testcase classname="tests.kernel.test_a" name="test_one[1]"><skipped type="pytest.skip"
message="no KVM">file.py:3: no KVM</skipped></testcase>
<testcase classname="tests.kernel.test_a" name="test_two"><skipped type="pytest.xfail"
message="broken"/></testcase>
<testcase classname="" name="tests.kernel.test_b"><skipped type="pytest.skip" message="all"/>
</testcase><testcase classname="tests.kernel.test_a" name="test_three"/></testsuite></testsuites>"""


def test_skips_of_a_pytest_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(SKIPS)
    assert junit.skips(report) == [
        Skip("test_a.py::test_one[1]", "no KVM"),
        Skip("test_a.py::test_two", "expected to fail: broken"),
        Skip("test_b.py::tests.kernel.test_b", "all"),
    ]
    assert junit.skips(tmp_path / "none.xml") == []


def one_skipped(report: Path) -> str:
    report.write_text(SKIPS)
    return ""


def test_a_skip_that_is_not_accounted_for_fails_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "REPORTS", tmp_path)
    assert suite.run_stages({"stage": one_skipped}) == 1
    assert "does not account for a skip: test_a.py::test_one[1] (no KVM)" in capsys.readouterr().out
    accepted = (Skip("*", "no KVM"), Skip("*", "expected to fail: broken"), Skip("*", "all"))
    monkeypatch.setattr(suite, "accepted_skips", lambda _: accepted)
    assert suite.run_stages({"stage": one_skipped}) == 0
    printed = capsys.readouterr().out
    assert "1 skipped: no KVM" in printed
    assert printed.splitlines()[-1] == "1 passed, 0 failed, 3 skipped"


def one_passed(report: Path) -> str:
    junit.write(report, "stage", [("test", 0.0, None)])
    return ""


def nothing(_: Path) -> str:
    return ""


def ended_badly(report: Path) -> str:
    one_passed(report)
    return "pytest ended with status 3"


def lost(report: Path) -> str:
    one_passed(report)
    raise guest.GuestLost("the guest was lost")


def not_built(_: Path) -> str:
    raise StepFailed("no such file")


@pytest.mark.parametrize(
    ("stages", "status", "line"),
    [
        ([one_passed], 0, "1 passed, 0 failed, 0 skipped"),
        ([one_passed, nothing], 1, "1 passed, 1 failed, 0 skipped"),
        ([one_passed, ended_badly], 1, "2 passed, 1 failed, 0 skipped"),
        ([lost, one_passed], 1, "2 passed, 1 failed, 0 skipped"),
        ([not_built], 1, "0 passed, 1 failed, 0 skipped"),
    ],
)
def test_the_sum(
    stages: list[suite.Stage],
    status: int,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(suite, "REPORTS", tmp_path)
    assert suite.run_stages({str(n): stage for n, stage in enumerate(stages)}) == status
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_an_old_report_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "REPORTS", tmp_path)
    one_passed(tmp_path / "stage.xml")
    assert suite.run_stages({"stage": nothing}) == 1


def test_sources_are_copied_and_stale_ones_removed(tmp_path: Path) -> None:
    root, copy = tmp_path / "kmod", tmp_path / "copy"
    (root / "uapi").mkdir(parents=True)
    copy.mkdir()
    for name in ("Kbuild", "main.c", "uapi/mergemem.h", "notes.md"):
        (root / name).write_text(name)
    (copy / "gone.c").touch()
    (copy / "mergemem.mod.c").touch()
    (copy / "facts.h").touch()
    build.copy_sources(copy, root)
    names = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert names == {"Kbuild", "main.c", "uapi/mergemem.h", "mergemem.mod.c", "facts.h"}
    before = (copy / "main.c").stat().st_mtime_ns
    build.copy_sources(copy, root)
    assert (copy / "main.c").stat().st_mtime_ns == before
