# SPDX-License-Identifier: MIT
"""``mergemem doctor``: whether this host can run mergemem, and what to do where it cannot.

Each check looks at one subject and yields findings; CHECKS lists them in the order of the way
from a kernel to merged pages. A problem keeps the module or the agent from working at all, a note
is worth knowing. Nothing is changed, loaded or asked for that would be loaded by asking.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mergemem_agent.error import MergememError
from mergemem_agent.finding import Finding, Severity, as_json, note, ok, problem, report
from mergemem_agent.host import Host, chosen
from mergemem_agent.policy_file import PolicyErrors, default_paths, load
from mergemem_agent.quantity import format_size

# As in tests/vm/kernels.toml and deploy/dkms.conf; a test compares them.
SUPPORTED_KERNELS = ("6.1", "6.12", "7.x")
NEEDED_OPTIONS = (
    "CONFIG_MODULES",
    "CONFIG_MMU",
    "CONFIG_KPROBES",
    "CONFIG_KALLSYMS",
    "CONFIG_MMU_NOTIFIER",
)
BPF_OPTIONS = ("CONFIG_BPF_SYSCALL", "CONFIG_BPF_JIT", "CONFIG_BPF_EVENTS")
TRACING = ("sys/kernel/tracing", "sys/kernel/debug/tracing")
LIBRARIES = {
    "jsonschema": "python3-jsonschema",
    "numpy": "python3-numpy",
    "prometheus_client": "python3-prometheus-client",
    "yaml": "python3-yaml",
}
BCC_SECONDS = 120


def main(arguments: Sequence[str]) -> int:
    """Run ``mergemem doctor ARGUMENTS``; return 0 if there is no problem, else 1."""
    parser = argparse.ArgumentParser(
        prog="mergemem doctor",
        description="Check whether this host can run mergemem, and say what to do where not.",
        epilog="Exit status 0: no problem was found; 1: there is one.",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--root", type=Path, default=Path("/"), help="root directory of the host (default: /)"
    )
    options = parser.parse_args(arguments)
    findings = list(examine(Host(options.root)))
    if options.json:
        print(json.dumps([as_json(finding) for finding in findings], indent=2))
    else:
        for line in report(findings):
            print(line)
    return int(any(finding.severity is Severity.PROBLEM for finding in findings))


def examine(host: Host) -> Iterator[Finding]:
    """Yield all findings."""
    for check in CHECKS:
        yield from check(host)


# --- kernel and module ---------------------------------------------------------------------------


def check_kernel(host: Host) -> Iterator[Finding]:
    """Version, page size and options: can the module exist here?"""
    supported = ", ".join(name if name[-1] == "x" else f"{name}.x" for name in SUPPORTED_KERNELS)
    release = host.kernel or "an unknown release"
    series = host.kernel_series
    if {series, series.partition(".")[0] + ".x"} & {*SUPPORTED_KERNELS}:
        yield ok("kernel", f"{release} is supported")
    else:
        yield problem(
            "kernel",
            f"{release} is not a kernel that the module is tested on",
            f"boot one of {supported}; 'mergemem estimate' works on every kernel",
        )
    if os.sysconf("SC_PAGE_SIZE") != 4096:
        yield problem("kernel", "its pages are not of 4 KiB", "boot a kernel with 4 KiB pages")
    missing = [name for name in NEEDED_OPTIONS if host.option(name) is False]
    if missing:
        yield problem(
            "kernel", f"was built without {', '.join(missing)}", "boot a distribution's kernel"
        )
    if not host.exists("proc/modules"):
        yield problem("kernel", "cannot load modules at all", "boot a distribution's kernel")
    elif host.text("proc/sys/kernel/modules_disabled") == "1":
        yield problem(
            "kernel",
            "loading of modules was switched off (kernel.modules_disabled)",
            "load mergemem before that happens, from modules-load.d; this needs a reboot",
        )


def check_installation(host: Host) -> Iterator[Finding]:
    """Module file and, where it is missing, what is needed to build one."""
    module = host.module_file
    if module is not None:
        yield ok("installation", f"{module} is installed")
        return
    build = f"lib/modules/{host.kernel}/build"
    if not host.exists(build):
        yield problem(
            "headers",
            f"the kernel's headers are not installed: there is no /{build}",
            f"apt install linux-headers-{host.kernel}",
        )
    else:
        yield ok("headers", f"/{build} is there")
    if versions := host.dkms_versions:
        yield problem(
            "installation",
            f"DKMS knows mergemem {', '.join(versions)}, but has not built it for {host.kernel}",
            f"dkms autoinstall -k {host.kernel}; its log is below /var/lib/dkms/mergemem",
        )
    elif not host.exists("sys/module/mergemem"):
        yield problem(
            "installation",
            f"mergemem.ko is not installed for {host.kernel}",
            "install mergemem-dkms, or build it with 'make kmod'",
        )


def check_signatures(host: Host) -> Iterator[Finding]:
    """Secure Boot, lockdown and enforcement: may the module be loaded?"""
    states = {True: "on", False: "off", None: "not there"}
    text = f"Secure Boot is {states[host.secure_boot]}, lockdown is {host.lockdown}"
    if not host.signatures_enforced:
        yield ok("signatures", f"{text}; modules need no signature")
        return
    module = host.module_file
    signed = host.module_signed(module) if module else None
    advice = (
        "sign it with a key that is enrolled with 'mokutil --import' (DKMS does the signing: see "
        "mok_signing_key in dkms(8))"
    )
    text += "; modules need a signature that the kernel trusts"
    if host.exists("sys/module/mergemem"):
        yield ok("signatures", f"{text}, and mergemem is loaded")
    elif module and signed is False:
        yield problem("signatures", f"{text}, and {module.name} has none", advice)
    else:
        yield note("signatures", text, advice)
    if host.lockdown == "confidentiality":
        yield problem(
            "lockdown",
            "confidentiality mode forbids kprobes, by which the module finds the kernel's symbols",
            "use integrity mode: lockdown=integrity on the kernel's command line",
        )


def check_module(host: Host) -> Iterator[Finding]:
    """Is the module there, and does it speak this program's contract?"""
    if not host.exists("sys/module/mergemem"):  # asking would have the kernel load it
        yield problem("module", "mergemem is not loaded", "modprobe mergemem; then see 'dmesg'")
        return
    version = host.text("sys/module/mergemem/version")
    if host.root != Path("/"):
        yield ok("module", f"mergemem {version} is loaded")
        return
    yield _ask_module(version)


def _ask_module(version: str) -> Finding:
    try:
        # Here and not above: numpy may be what is missing.
        from mergemem_agent.module import Module, PermissionDenied
    except ImportError as error:
        return note("module", f"mergemem {version} is loaded, but cannot be asked: {error}")
    try:
        with Module() as module:
            info = module.info()
    except PermissionDenied as error:
        return note("module", f"mergemem {version} is loaded, but: {error.message}", error.hint)
    except MergememError as error:
        return problem("module", f"mergemem {version} is loaded, but: {error.message}", error.hint)
    totals = info.totals
    return ok(
        "module",
        f"mergemem {info.module_version} is loaded, contract version {info.contract_version}; "
        f"{totals.shared_pages} shared pages with {totals.shared_mappings} mappings",
    )


# --- this user and its programs ------------------------------------------------------------------


def check_capabilities(host: Host) -> Iterator[Finding]:
    """What may the caller do?"""
    if not host.initial_user_namespace:
        yield problem(
            "namespace",
            "this is a user namespace of a container: the module answers nobody here",
            "run the agent on the host, or in a container without a user namespace of its own",
        )
    uses = {
        "CAP_SYS_PTRACE": "agent, merge, unmerge, and other users' processes in estimates",
        "CAP_DAC_READ_SEARCH": "other users' processes in estimates",
        "CAP_SYS_ADMIN": "frame numbers, which make estimates exact",
        "CAP_SYS_MODULE": "loading the module",
        "CAP_BPF": "hints from page faults",
        "CAP_PERFMON": "hints from page faults",
    }
    had = host.capabilities
    missing = [name for name in uses if name not in had]
    if not missing:
        yield ok("capabilities", f"this user has {', '.join(uses)}")
        return
    lines = [f"this user lacks {name}: {uses[name]}" for name in missing]
    yield note("capabilities", "\n".join(lines), "run as root what needs them")


def check_libraries(host: Host) -> Iterator[Finding]:
    """Python libraries of the agent, and BCC for its hints."""
    del host  # those of the interpreter that runs this
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(LIBRARIES[name] for name in missing)
        yield problem(
            "libraries", f"{sys.executable} lacks {', '.join(missing)}", f"apt install {packages}"
        )
    else:
        yield ok("libraries", f"{sys.executable} has {', '.join(LIBRARIES)}")
    yield _check_bcc()


def _check_bcc() -> Finding:
    # In a process of its own: BCC brings LLVM, 60 MB of it. There is a package "bcc" on PyPI that
    # is something else, so ask for what the agent uses.
    command = [sys.executable, "-c", "from bcc import BPF; import bcc; print(bcc.__version__)"]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=BCC_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return note("BCC", f"could not be tried: {error}")
    if result.returncode == 0:
        return ok("BCC", f"{result.stdout.strip()} can be imported")
    reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
    return note(
        "BCC",
        f"cannot be imported, so there are no hints from page faults: {reason}",
        "apt install python3-bpfcc, and run mergemem with /usr/bin/python3 or a virtual "
        "environment made by it with --system-site-packages",
    )


def check_hints(host: Host) -> Iterator[Finding]:
    """Whether the kernel can count page faults for the agent; without that it works from /proc."""
    missing = [name for name in BPF_OPTIONS if host.option(name) is False]
    headers = f"lib/modules/{host.kernel}/build"
    if missing:
        yield note(
            "hints",
            f"the kernel was built without {', '.join(missing)}: processes are found in /proc, and "
            "memory is visited in turn",
            "boot a distribution's kernel",
        )
    elif not host.exists(headers):
        yield note(
            "hints",
            f"BCC compiles against the kernel's headers, and there is no /{headers}",
            f"apt install linux-headers-{host.kernel}",
        )
    elif any(host.exists(tracing) for tracing in TRACING) and not any(
        host.exists(f"{tracing}/events/exceptions/page_fault_user") for tracing in TRACING
    ):
        yield note("hints", "the kernel has no tracepoint of page faults: reads count like writes")
    else:
        yield ok("hints", "the kernel can tell of page faults and processes by BPF")


def check_policies(host: Host) -> Iterator[Finding]:
    """Are there policies, and are they right?"""
    root = host.root / "etc/mergemem"
    paths = default_paths(root)
    if not paths:
        yield note(
            "policies",
            f"{root} has no policy files: the agent merges nothing",
            "write one; docs/policies.md tells how, and deploy/mergemem.yaml is an example",
        )
        return
    try:
        policies = load(paths).policies
    except PolicyErrors as error:
        yield problem("policies", error.message, error.hint)
        return
    names = ", ".join(policy.name for policy in policies) or "none"
    yield ok("policies", f"{len(paths)} files are right; policies: {names}")


# --- the host's memory ---------------------------------------------------------------------------


def check_huge_pages(host: Host) -> Iterator[Finding]:
    """Transparent huge pages hide small equal pages."""
    mode = chosen(host.text("sys/kernel/mm/transparent_hugepage/enabled"))
    if mode == "always":
        yield note(
            "huge pages",
            "transparent huge pages are 'always' in use; they are merged only by policies that "
            "say so",
            "say 'huge: split' in the policies of fleets that gain from it, which "
            "'mergemem estimate' tells",
        )
    else:
        yield ok("huge pages", f"transparent huge pages: {mode or 'not there'}")


def check_ksm(host: Host) -> Iterator[Finding]:
    """KSM merges too, and what it has merged is its own."""
    if host.text("sys/kernel/mm/ksm/run") == "1":
        shared = host.text("sys/kernel/mm/ksm/pages_sharing") or "0"
        yield note(
            "KSM",
            f"is running and has merged {shared} pages, which mergemem leaves alone",
            "let one of both do the work: echo 0 > /sys/kernel/mm/ksm/run stops KSM and keeps "
            "what it has merged, echo 2 gives that back",
        )
    else:
        yield ok("KSM", "is not running")


def check_memory(host: Host) -> Iterator[Finding]:
    """How much memory there is, and whether pressure on it can be seen."""
    total, available = host.memory_bytes("MemTotal"), host.memory_bytes("MemAvailable")
    swap = host.memory_bytes("SwapTotal")
    text = (
        f"{format_size(available)} of {format_size(total)} available, {format_size(swap)} of swap"
    )
    # Undoing merges takes memory: that is when those who have none left notice.
    if available * 20 < total:
        yield note("memory", f"{text}: 'mergemem unmerge' may be refused", "keep 5% available")
    else:
        yield ok("memory", text)
    if swap:
        yield note("swap", "shared pages stay in memory: they are not swapped while shared")
    if not host.exists("proc/pressure/memory"):
        yield note(
            "pressure",
            "the kernel does not tell memory pressure (PSI), to which the agent would yield",
            "boot with psi=1",
        )


Check = Callable[[Host], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    check_kernel,
    check_installation,
    check_signatures,
    check_module,
    check_capabilities,
    check_libraries,
    check_hints,
    check_policies,
    check_huge_pages,
    check_ksm,
    check_memory,
)
