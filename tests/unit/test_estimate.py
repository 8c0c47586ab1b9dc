# SPDX-License-Identifier: MIT
"""`mergemem estimate`: the command on real processes, and its hints."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mergemem_agent import fleet
from mergemem_agent.census import Census, DomainCensus
from mergemem_agent.gap import Limit
from mergemem_agent.procfs import Process, ProcessId, ProcFs
from mergemem_agent.report import Estimate
from mergemem_agent.tally import Tally

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("memory_process.py")


@pytest.fixture
def memory() -> Iterator[int]:
    """Start a process with three pages of one content, one of another and one of zeros."""
    command = [sys.executable, str(PROGRAM), "1,1,1,2,0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as program:
        assert program.stdout is not None
        assert program.stdin is not None
        pid, _ = program.stdout.readline().split()
        yield int(pid)
        program.stdin.close()
        program.stdout.read()


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mergemem_agent", "estimate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)


def run_json(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.stderr == ""  # no progress bar: this is no terminal
    return json.loads(result.stdout)


def test_json_holds_every_figure(memory: int) -> None:
    report = run_json("--pid", memory)
    (domain,) = report["domains"]
    assert domain["pids"] == [memory]
    assert domain["domain"].startswith(f"user={os.getuid()},cgroup=/")
    for figures in (domain, report["total"]):
        assert figures["mergeable_duplicates"] == figures["duplicates_within"] == 2
        assert figures["frames"] == 5
        assert figures["zero"] == 1
    assert report["exact"] == (not report["limits"])
    assert {gap["reason"] for gap in report["gaps"]} == {"refused"}


def test_report_says_what_would_be_freed(memory: int) -> None:
    result = run("--pid", memory)
    assert result.returncode == 0
    assert re.search(r"^ +20KiB  of page frames", result.stdout, re.MULTILINE)
    assert re.search(r"^ +8KiB  would be freed by merging: 40%$", result.stdout, re.MULTILINE)
    assert re.search(r"^ +4KiB  filled with zeros \(not part of", result.stdout, re.MULTILINE)
    assert f"MADV_DONTDUMP: so are secrets): process {memory}" in result.stdout


def test_policies_choose_processes_and_domains(memory: int, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "policies:\n"
        "  - name: memories\n"
        "    domain: policy\n"
        f"    select: {{command_line: '{PROGRAM.name} 1,1,1,2,0$'}}\n",
        encoding="utf-8",
    )
    report = run_json("--policy", policy)
    (domain,) = report["domains"]
    assert domain["domain"] == "policy=memories"
    assert memory in domain["pids"]


def test_policies_that_choose_nobody_are_an_error(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("policies:\n  - name: none\n    select: {executable: /none}\n", "utf-8")
    result = run("--policy", policy)
    assert result.returncode == 1
    assert "choose none of the processes" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sample", "10"], "10%"),
        (["--sample", "0%"], "not above 0%"),
        (["--sample", "101%"], "not above 0%, up to 100%"),
        (["--pid", "x"], "not a process id"),
        (["--pid", "1", "--policy", "x"], "not allowed with"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert said in result.stderr


def test_a_process_that_is_not_there_is_an_error() -> None:
    result = run("--pid", 2**22 + 1)
    assert result.returncode == 1
    assert result.stderr.startswith("mergemem: there is no process")


def test_kernel_threads_alone_are_an_error() -> None:
    thread = ProcFs().process(2)
    if thread is None or not thread.kernel_thread:
        pytest.skip("this pid namespace has no kernel threads")
    result = run("--pid", 2)
    assert result.returncode == 1
    assert "none of the 1 processes could be read: kernel thread" in result.stderr


def test_priority_is_lowered() -> None:
    script = (
        "import os; from mergemem_agent.estimate import lower_priority; lower_priority();"
        "print(os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0) == os.SCHED_BATCH)"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert result.stdout.split() == ["19", "True"]


def test_a_terminal_gets_a_progress_bar_that_is_wiped_at_the_end(memory: int) -> None:
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "mergemem_agent", "estimate", "--pid", str(memory)]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=end, cwd=REPOSITORY, check=True)
    os.close(end)
    seen = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert re.search(r"\r\x1b\[Kreading \[#*\.*\] +\d+%", seen)
    assert seen.endswith("\r\x1b[K")


# --- hints ---------------------------------------------------------------------------------------


def process(pid: int, parent: int, executable: str = "/usr/bin/python3") -> Process:
    """Return a process of 1 MiB."""
    return Process(
        id=ProcessId(pid, 1),
        parent_pid=parent,
        uid=1000,
        executable=executable,
        command_line=(),
        cgroup="/",
        anonymous_bytes=1 << 20,
        age_seconds=60,
        kernel_thread=False,
    )


def counted(pids: Sequence[int], tally: Tally, *limits: Limit, domain: str = "d") -> Census:
    """Return a census of one domain."""
    one = DomainCensus(domain, 1000, tuple(pids), tally, 0, 0)
    return Census((one,), (), frozenset(limits), 1.0, 0)


def hints(processes: Sequence[Process], tally: Tally, root: Path, *limits: Limit) -> str:
    by_pid = {process.id.pid: process for process in processes}
    return "\n".join(fleet.hints(counted(list(by_pid), tally, *limits), by_pid, root))


LITTLE = Tally(frames=1000, duplicates_between=12)
MUCH = Tally(frames=1000, duplicates_between=750)


@pytest.fixture
def proc_root(tmp_path: Path) -> Path:
    """Make a /proc of a host with ASLR."""
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/kernel/randomize_va_space").write_text("2\n", "ascii")
    return tmp_path


def test_families_descend_from_one_process_of_the_same_program() -> None:
    shell = process(1, 0, "/bin/sh")
    fleet_a = [process(10, 1), process(11, 10), process(12, 10), process(13, 12)]
    fleet_b = [process(20, 1)]
    found = fleet.families([fleet_a[3], shell, *fleet_a[:3], *fleet_b])
    assert {family.root.id.pid: len(family.processes) for family in found} == {1: 1, 10: 4, 20: 1}


def test_families_survive_a_circle_of_recycled_pids() -> None:
    assert len(fleet.families([process(1, 2), process(2, 1)])) == 2


def test_aslr_is_named_when_separate_processes_share_little(proc_root: Path) -> None:
    separate = [process(10, 1), process(20, 1)]
    assert "address space layout randomization" in hints(separate, LITTLE, proc_root)
    assert "layout" not in hints(separate, MUCH, proc_root)
    assert "layout" not in hints([process(10, 1), process(11, 10)], LITTLE, proc_root)
    assert "layout" not in hints([process(10, 1), process(20, 1, "/x")], LITTLE, proc_root)
    (proc_root / "sys/kernel/randomize_va_space").write_text("0\n", "ascii")
    assert "layout" not in hints(separate, LITTLE, proc_root)


def test_aslr_is_not_blamed_for_processes_without_it(proc_root: Path) -> None:
    for pid in (10, 20):
        (proc_root / str(pid)).mkdir()
        (proc_root / str(pid) / "personality").write_text("00040000\n", "ascii")
    assert "layout" not in hints([process(10, 1), process(20, 1)], LITTLE, proc_root)


def test_prefork_fleets_are_named(proc_root: Path) -> None:
    workers = [process(10, 1), process(11, 10), process(12, 10)]
    assert "gc.freeze()" in hints(workers, MUCH, proc_root)
    assert "estimate again" in hints(workers, LITTLE, proc_root)
    assert "fleet" not in hints(workers[:2], MUCH, proc_root)


def test_small_programs_are_not_worth_a_hint(proc_root: Path) -> None:
    large = [process(pid, 1, f"/bin/{pid}") for pid in range(100, 200)]
    assert hints([*large, process(10, 1), process(20, 1)], LITTLE, proc_root) == ""


def test_huge_pages_are_named(proc_root: Path) -> None:
    huge = Tally(frames=1000, huge=600, huge_duplicates=300)
    assert "1.2MiB more are duplicates within huge pages" in hints([process(1, 0)], huge, proc_root)
    (proc_root / "1").mkdir()
    (proc_root / "1/smaps_rollup").write_text("AnonHugePages:      2048 kB\n", "ascii")
    text = hints([process(1, 0)], MUCH, proc_root, Limit.FRAME_FLAGS)
    assert "2MiB of these processes' memory is in huge pages" in text


def test_held_duplicates_are_named(proc_root: Path) -> None:
    held = Tally(frames=1000, held_elsewhere=100)
    assert "select the parent of a fleet" in hints([process(1, 0)], held, proc_root)


def test_a_report_cannot_drive_the_terminal() -> None:
    result = counted([1], Tally(frames=1), domain="cgroup=/\x1b[2J\u202e")
    lines = list(Estimate(result, (), 0.1).report())
    assert lines[0] == r"cgroup=/\x1b[2J\u202e user=1000: 1 process"


def test_a_sample_and_limits_are_told() -> None:
    one = DomainCensus("d", None, (1,), LITTLE, 0, 256)
    result = Census((one,), (), frozenset({Limit.FRAME_NUMBERS}), 0.1, 0)
    text = "\n".join(Estimate(result, (), 0.1).report())
    assert "give or take 1MiB" in text
    assert "a sample of 10% of contents" in text
    assert "needs CAP_SYS_ADMIN" in text
