# SPDX-License-Identifier: MIT
"""``mergemem policy``: check, and explain of real processes."""

import mmap
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergemem_agent import explain
from mergemem_agent.error import ProcessGone
from mergemem_agent.policy_file import PolicyErrors
from mergemem_agent.procfs import Mapping

CHECKOUT = Path(__file__).parents[2]
POLICIES = """\
policies:
  - name: secrets
    select: {executable: "**/gpg-agent"}
    merge: never
  - name: not-me
    select: {minimum_age: "0s"}
    exclude: [{user: 4000000000}, {minimum_anonymous: "1KiB"}]
  - name: mine
    select: {executable: "/**", cgroup: "**"}
    include_undumpable: true
    domain: user
  - name: last
    select: {user: 0}
"""

# What smaps calls the flags of the module's list: fs/proc/task_mmu.c, show_smap_vma_flags().
CODES = {
    "VM_SHARED": "sh",
    "VM_MAYSHARE": "ms",
    "VM_PFNMAP": "pf",
    "VM_IO": "io",
    "VM_MIXEDMAP": "mm",
    "VM_DONTEXPAND": "de",
    "VM_HUGETLB": "ht",
    "VM_LOCKED": "lo",
    "VM_DONTDUMP": "dd",
    "VM_WIPEONFORK": "wf",
    "VM_UFFD_MISSING": "um",
    "VM_UFFD_WP": "uw",
    "VM_UFFD_MINOR": "ui",
    "VM_UFFD_RWP": "ur",
    "VM_SHADOW_STACK": "ss",
    "VM_DROPPABLE": "dp",
}


@pytest.fixture
def policies(tmp_path: Path) -> str:
    path = tmp_path / "policies.yaml"
    path.write_text(POLICIES)
    return str(path)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def mapping(
    permissions: str = "rw-p", inode: int = 0, name: str = "", flags: str = "rd wr"
) -> Mapping:
    return Mapping(0x1000, 0x3000, permissions, inode, name, frozenset(flags.split()))


def test_the_reasons_are_those_of_the_kernel_module() -> None:
    source = (CHECKOUT / "kmod" / "target.c").read_text(encoding="utf-8")
    found = re.search(r"#define REFUSED_VM_FLAGS((?:.*\\\n)*.*)", source)
    assert found is not None
    in_kernel = {CODES[name] for name in re.findall(r"VM_\w+", found[1])}
    assert in_kernel == set(explain.REFUSED_FLAGS)


@pytest.mark.parametrize("flag", sorted(explain.REFUSED_FLAGS))
def test_each_flag_is_a_reason(flag: str) -> None:
    assert explain.refusals(mapping(flags=f"rd {flag}")) == (explain.REFUSED_FLAGS[flag],)


def test_reasons() -> None:
    assert explain.refusals(mapping()) == ()
    assert explain.refusals(mapping(name="[heap]")) == ()
    assert explain.refusals(mapping(name="[vdso]", flags="rd de")) == ("the kernel's own pages",)
    assert explain.refusals(mapping(inode=5, name="/lib/x")) == ("backed by a file",)
    shared = explain.refusals(mapping("rw-s", inode=5, name="/dev/shm/x", flags="sh ms"))
    assert shared == ("backed by a file", "shared between processes already")
    assert len(explain.refusals(mapping(flags="dd wf"))) == 2


def test_check(policies: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main(["check", policies]) == 0
    output = capsys.readouterr().out
    assert output.startswith("4 policies in 1 file\n")
    assert f"1. secrets ({policies}:2): never merged" in output
    assert "domain user, budget 5%, settle 10s, zero pages too, huge pages stay whole" in output
    assert "undumpable processes too" in output


def test_check_refuses(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("policies: 3\nagent: 4\n")
    with pytest.raises(PolicyErrors) as caught:
        explain.main(["check", str(path)])
    assert len(caught.value.diagnostics) == 2


def test_check_without_any_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(explain, "default_paths", list)
    assert explain.main(["check"]) == 0
    assert "no process is merged" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["explain"], ["explain", "x"], ["explain", "0"], ["un"]])
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        explain.main(arguments)
    assert caught.value.code == 2
    assert "usage: mergemem policy" in capsys.readouterr().err


def test_explain_of_this_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(POLICIES)
    with mmap.mmap(-1, 3 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_DONTDUMP)
        arguments = ["explain", str(os.getpid()), "--policy", str(path)]
        assert explain.main(arguments) == 0
        brief = capsys.readouterr().out
        assert explain.main([*arguments, "--all-mappings"]) == 0
    full = capsys.readouterr().out
    assert "1. secrets" in brief
    assert "not selected\n" in brief
    assert "2. not-me" in brief
    assert "exclude[1]: matches" in brief
    assert f"verdict: merged by policy 'mine', within domain user={os.getuid()}\n" in brief
    assert "1 policy not asked" in brief
    assert re.search(r"3MiB in 1 mapping  refused: kept out of core dumps.*\n +\w+-\w+ rw-p", brief)
    assert re.search(r"in \d+ mappings?  may be merged", brief)
    assert "[vdso]" in full
    assert "[vdso]" not in brief


def test_explain_never_and_nobody(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text('policies: [{name: n, select: {minimum_age: "0s"}, merge: never}]')
    explain.main(["explain", str(sleeper.pid), "--policy", str(path)])
    assert "verdict: not merged: policy 'n' says merge: never" in capsys.readouterr().out
    path.write_text('policies: [{name: n, select: {minimum_age: "1d"}}]')
    explain.main(["explain", str(sleeper.pid), "--policy", str(path)])
    assert "verdict: not merged: no policy wants it" in capsys.readouterr().out


@pytest.mark.skipif(os.getuid() != 0, reason="changes its user")
def test_explain_of_a_process_that_is_not_dumpable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text('policies: [{name: n, select: {minimum_age: "0s"}}]')
    ready, say_ready = os.pipe()
    hold, release = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(65534, 65534, 65534)
            os.write(say_ready, b"!")
            os.close(release)
            os.read(hold, 1)
        finally:
            os._exit(0)
    os.close(hold)
    os.read(ready, 1)
    explain.main(["explain", str(child), "--policy", str(path)])
    output = capsys.readouterr().out
    os.close(release)
    os.waitpid(child, 0)
    assert "dumpable      no" in output
    assert "verdict: not merged: the process is not dumpable" in output


def test_explain_of_a_kernel_thread(policies: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/proc/2/stat").exists():
        pytest.skip("kernel threads are out of sight in this pid namespace")
    explain.main(["explain", "2", "--policy", policies])
    assert "a kernel thread has no memory of its own" in capsys.readouterr().out


def test_explain_of_nobody(policies: str, sleeper: subprocess.Popen[bytes]) -> None:
    sleeper.kill()
    sleeper.wait()
    with pytest.raises(ProcessGone, match=str(sleeper.pid)):
        explain.main(["explain", str(sleeper.pid), "--policy", policies])


def test_a_process_cannot_talk_to_the_terminal(
    policies: str, capsys: pytest.CaptureFixture[str]
) -> None:
    title = "evil\x1b[2J\nverdict: merged"
    with subprocess.Popen([title, "600"], executable="/bin/sleep") as process:
        explain.main(["explain", str(process.pid), "--policy", policies])
        process.kill()
    output = capsys.readouterr().out
    assert r"evil\x1b[2J\nverdict: merged 600" in output
    assert "\x1b" not in output
