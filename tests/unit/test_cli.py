# SPDX-License-Identifier: MIT
"""The command line: what is printed where, and with which exit status."""

import importlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mergemem_agent import __version__, cli

ROOT = Path(__file__).parents[2]

ZEN4 = (
    "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n\nprocessor\t: 1\n"
)
INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\n\n"
VARIABLE = "NPY_DISABLE_CPU_FEATURES"


def test_every_command_is_there_and_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for command in cli.COMMANDS:
        assert callable(importlib.import_module(f"mergemem_agent.{command.module}").main)
        with pytest.raises(SystemExit) as status:
            cli.main([command.name, "--help"])
        assert status.value.code == 0
        assert f"usage: mergemem {command.name}" in capsys.readouterr().out


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command.name in printed for command in cli.COMMANDS)
    assert cli.main([]) == cli.USAGE_STATUS


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mergemem {__version__}\n"


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["merg"]) == cli.USAGE_STATUS
    assert "merg" in capsys.readouterr().err


def test_wrong_usage_of_a_command() -> None:
    with pytest.raises(SystemExit) as status:
        cli.main(["merge", "not-a-pid"])
    assert status.value.code == cli.USAGE_STATUS


def test_a_reader_that_goes_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "mergemem_agent", "--help"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        command, cwd=ROOT, env=buffered, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.stderr, done.returncode) == (b"", 1)


def test_nothing_heavy_is_imported_for_the_usage() -> None:
    code = (
        "import sys; from mergemem_agent.cli import main; main(['--help']);"
        "print([m for m in ('numpy', 'prometheus_client', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("cpuinfo", "numpy_version", "expected"),
    [
        (ZEN4, "2.4.6", "X86_V4 AVX512_ICL"),
        (ZEN4, "2.2.4", "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL"),
        (INTEL, "2.4.6", None),
        ("", "2.4.6", None),
    ],
)
def test_the_slow_sort_is_avoided_where_it_is_slow(
    cpuinfo: str,
    numpy_version: str,
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: numpy_version)
    monkeypatch.setenv(VARIABLE, "x")
    monkeypatch.delenv(VARIABLE)
    file = tmp_path / "cpuinfo"
    file.write_text(cpuinfo)
    cli.avoid_slow_sort(file)
    assert os.environ.get(VARIABLE) == expected


def test_a_choice_that_was_made_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "mine")
    file = tmp_path / "cpuinfo"
    file.write_text(ZEN4)
    cli.avoid_slow_sort(file)
    assert os.environ[VARIABLE] == "mine"
