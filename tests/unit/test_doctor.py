# SPDX-License-Identifier: MIT
"""`mergemem doctor` on root directories made for it, and on this machine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from mergemem_agent import doctor
from mergemem_agent.finding import Finding, Severity
from mergemem_agent.host import Host

REPOSITORY = Path(__file__).resolve().parents[2]
KERNEL = "6.1.0-28-amd64"
ALL_CAPABILITIES = "000001ffffffffff"

# A healthy Debian 12 host.
HEALTHY = {
    "proc/sys/kernel/osrelease": KERNEL,
    "proc/sys/kernel/modules_disabled": "0",
    "proc/modules": "mergemem 40960 0 - Live 0x0000000000000000 (OE)\n",
    "proc/self/status": f"Name:\tx\nCapInh:\t0000000000000000\nCapEff:\t{ALL_CAPABILITIES}\n",
    "proc/self/uid_map": "         0          0 4294967295\n",
    "proc/meminfo": "MemTotal: 1000 kB\nMemAvailable:  500 kB\nSwapTotal:  0 kB\n",
    "proc/pressure/memory": "some avg10=0.00\n",
    f"boot/config-{KERNEL}": "".join(
        f"{name}=y\n" for name in (*doctor.NEEDED_OPTIONS, *doctor.BPF_OPTIONS)
    ),
    f"lib/modules/{KERNEL}/updates/dkms/mergemem.ko": "ELF",
    "sys/module/mergemem/version": "0.1.0\n",
    "sys/module/module/parameters/sig_enforce": "N\n",
    "sys/kernel/security/lockdown": "[none] integrity confidentiality\n",
    f"lib/modules/{KERNEL}/build/Makefile": "",
    "sys/kernel/tracing/events/exceptions/page_fault_user/id": "1\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    "sys/kernel/mm/ksm/run": "0\n",
    "etc/mergemem/mergemem.yaml": "policies:\n  - name: web\n    select:\n      user: root\n",
}


class Tree:
    """A root directory that a test can change before it is examined."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for path, text in HEALTHY.items():
            self.write(path, text)

    def write(self, path: str, content: str | bytes) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    def remove(self, path: str) -> None:
        (self.root / path).unlink()

    def remove_all(self, path: str) -> None:
        shutil.rmtree(self.root / path)

    def find(self, check: doctor.Check) -> list[Finding]:
        return list(check(Host(self.root)))

    def one(self, check: doctor.Check) -> Finding:
        (finding,) = self.find(check)
        return finding


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Make a healthy host."""
    return Tree(tmp_path)


def severities(findings: list[Finding]) -> list[Severity]:
    return [finding.severity for finding in findings]


def test_a_healthy_host_has_no_problem(tree: Tree) -> None:
    for check in doctor.CHECKS:
        if check is not doctor.check_libraries:  # those of this machine, whatever they are
            assert set(severities(tree.find(check))) == {Severity.OK}, check.__name__


def test_supported_kernels_are_those_that_are_tested() -> None:
    table = tomllib.loads((REPOSITORY / "tests/vm/kernels.toml").read_text(encoding="utf-8"))
    assert [kernel["name"] for kernel in table["kernel"]] == list(doctor.SUPPORTED_KERNELS)
    dkms = (REPOSITORY / "deploy/dkms.conf").read_text(encoding="utf-8")
    pattern = re.search(r'^BUILD_EXCLUSIVE_KERNEL="(.*)"$', dkms, re.MULTILINE)
    assert pattern is not None
    for series in doctor.SUPPORTED_KERNELS:
        assert re.search(pattern[1], f"{series.replace('x', '3')}.0-28-amd64")
    options = re.search(r'^BUILD_EXCLUSIVE_CONFIG="(.*)"$', dkms, re.MULTILINE)
    assert options is not None
    assert {*options[1].split()} <= {*doctor.NEEDED_OPTIONS}


Break = Callable[[Tree], None]


@pytest.mark.parametrize(
    ("damage", "check", "said"),
    [
        (lambda t: t.write("proc/sys/kernel/osrelease", "5.10.0-1"), doctor.check_kernel, "5.10"),
        (lambda t: t.write("proc/sys/kernel/osrelease", "6.10.3"), doctor.check_kernel, "6.10.3"),
        (
            lambda t: t.write(f"boot/config-{KERNEL}", "# CONFIG_KPROBES is not set\n"),
            doctor.check_kernel,
            "CONFIG_KPROBES",
        ),
        (
            lambda t: t.write("proc/sys/kernel/modules_disabled", "1"),
            doctor.check_kernel,
            "modules_disabled",
        ),
        (lambda t: t.remove("proc/modules"), doctor.check_kernel, "cannot load modules"),
        (
            lambda t: t.remove_all(f"lib/modules/{KERNEL}"),
            doctor.check_installation,
            "headers",
        ),
        (lambda t: t.remove("sys/module/mergemem/version") or
         (t.root / "sys/module/mergemem").rmdir(), doctor.check_module, "not loaded"),
        (
            lambda t: t.write("sys/kernel/security/lockdown", "none integrity [confidentiality]"),
            doctor.check_signatures,
            "confidentiality",
        ),
        (
            lambda t: t.write("proc/self/uid_map", "0 100000 65536\n"),
            doctor.check_capabilities,
            "user namespace",
        ),
        (
            lambda t: t.write("etc/mergemem/policy.d/10.yaml", "policies:\n  - nmae: web\n"),
            doctor.check_policies,
            "10.yaml:2",
        ),
    ],
)  # fmt: skip
def test_problems_are_found_with_what_to_do(
    tree: Tree, damage: Break, check: doctor.Check, said: str
) -> None:
    damage(tree)
    problems = [found for found in tree.find(check) if found.severity is Severity.PROBLEM]
    assert len(problems) == 1
    assert said in problems[0].text
    assert problems[0].advice


@pytest.mark.parametrize(
    ("path", "text", "check", "said"),
    [
        (
            "sys/kernel/mm/transparent_hugepage/enabled",
            "[always] madvise never",
            doctor.check_huge_pages,
            "always",
        ),
        ("sys/kernel/mm/ksm/run", "1", doctor.check_ksm, "running"),
        ("proc/self/status", "CapEff:\t0000000000000000\n", doctor.check_capabilities, "PTRACE"),
        (
            f"boot/config-{KERNEL}",
            "# CONFIG_BPF_SYSCALL is not set\n",
            doctor.check_hints,
            "CONFIG_BPF_SYSCALL",
        ),
        (
            "proc/meminfo",
            "MemTotal: 1000 kB\nMemAvailable: 49 kB\nSwapTotal: 0 kB\n",
            doctor.check_memory,
            "refused",
        ),
    ],
)
def test_notes_are_no_problems(
    tree: Tree, path: str, text: str, check: doctor.Check, said: str
) -> None:
    tree.write(path, text)
    finding = tree.one(check)
    assert finding.severity is Severity.NOTE
    assert said in finding.text


def test_what_hints_lack_is_a_note(tree: Tree) -> None:
    tree.remove("sys/kernel/tracing/events/exceptions/page_fault_user/id")
    (tree.root / "sys/kernel/tracing/events/exceptions/page_fault_user").rmdir()
    assert "reads count like writes" in tree.one(doctor.check_hints).text
    tree.remove_all(f"lib/modules/{KERNEL}/build")
    finding = tree.one(doctor.check_hints)
    assert finding.severity is Severity.NOTE
    assert "linux-headers" in finding.advice


def test_headers_follow_an_absolute_link_within_the_root(tree: Tree) -> None:
    tree.remove_all(f"lib/modules/{KERNEL}")
    link = tree.root / f"lib/modules/{KERNEL}/build"
    link.parent.mkdir()
    link.symlink_to(f"/usr/src/linux-headers-{KERNEL}")
    assert Severity.PROBLEM in severities(tree.find(doctor.check_installation))
    tree.write(f"usr/src/linux-headers-{KERNEL}/Makefile", "")
    assert severities(tree.find(doctor.check_installation)) == [Severity.OK]


def test_dkms_without_a_build_is_a_problem(tree: Tree) -> None:
    tree.remove(f"lib/modules/{KERNEL}/updates/dkms/mergemem.ko")
    tree.write(f"lib/modules/{KERNEL}/build/Makefile", "")
    tree.write("var/lib/dkms/mergemem/0.1.0/source", "")
    headers, dkms = tree.find(doctor.check_installation)
    assert headers.severity is Severity.OK
    assert dkms.severity is Severity.PROBLEM
    assert "0.1.0" in dkms.text


def enforce(tree: Tree, module: bytes, name: str = "mergemem.ko") -> None:
    """Have the kernel ask for signatures, with a module that is installed and not loaded."""
    tree.remove("sys/module/mergemem/version")
    (tree.root / "sys/module/mergemem").rmdir()
    tree.remove(f"lib/modules/{KERNEL}/updates/dkms/mergemem.ko")
    tree.write(f"lib/modules/{KERNEL}/updates/dkms/{name}", module)
    tree.write("sys/kernel/security/lockdown", "none [integrity] confidentiality")
    variable = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
    tree.write(variable, b"\6\0\0\0\1")


def test_an_unsigned_module_under_secure_boot_is_a_problem(tree: Tree) -> None:
    enforce(tree, b"ELF")
    finding = tree.one(doctor.check_signatures)
    assert finding.severity is Severity.PROBLEM
    assert "Secure Boot is on" in finding.text
    assert "mokutil" in finding.advice


@pytest.mark.parametrize(
    ("module", "name"),
    [(b"ELF~Module signature appended~\n", "mergemem.ko"), (b"xz", "mergemem.ko.xz")],
)
def test_a_module_that_may_be_trusted_is_a_note(tree: Tree, module: bytes, name: str) -> None:
    enforce(tree, module, name)
    assert tree.one(doctor.check_signatures).severity is Severity.NOTE


def test_capabilities_are_decoded_by_bit(tree: Tree) -> None:
    mask = 1 << 19 | 1 << 21
    tree.write("proc/self/status", f"CapEff:\t{mask:016x}\n")
    assert Host(tree.root).capabilities == {"CAP_SYS_PTRACE", "CAP_SYS_ADMIN"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mergemem_agent", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)


def test_exit_status_and_json(tree: Tree) -> None:
    good = run("--root", str(tree.root), "--json")
    findings = json.loads(good.stdout)
    ignored = {"libraries", "BCC"}  # of this machine
    assert {finding["severity"] for finding in findings if finding["subject"] not in ignored} == {
        "ok"
    }
    tree.write("proc/sys/kernel/osrelease", "4.19.0")
    bad = run("--root", str(tree.root))
    assert bad.returncode == 1
    assert re.search(r"^problem +kernel +4\.19\.0", bad.stdout, re.MULTILINE)
    assert re.search(r"^ +-> boot one of 6\.1\.x", bad.stdout, re.MULTILINE)


def test_this_machine_can_be_examined() -> None:
    result = run()
    assert result.returncode in (0, 1)
    assert result.stderr == ""
    assert ("problem  " in result.stdout) == (result.returncode == 1)
