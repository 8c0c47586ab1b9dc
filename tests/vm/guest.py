# SPDX-License-Identifier: MIT
"""One run of a command in a guest: boot, command, verdict.

    host                                   guest
    ----                                   -----
    run directory  <── 9p, uncached ──>    /run/vm: settings, command; started, dmesg, status
    console.log    <── first serial ───    kernel log, init
    our output     <── second serial ──    the command's output, live
    checkout       <── 9p ────────────>    the same path, read-write
    /              ─── 9p, read-only ──>   the bottom of the root overlay

The exit status comes through a file. No file means that the guest was lost, which is an error of
its own, and never a status.
"""

from __future__ import annotations

import os
import selectors
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.vm import accelerator, build, emulator, initramfs, log, tree
from tests.vm.cache import BUILD, CHECKOUT, cache_dir
from tests.vm.kernels import Kernel, find
from tests.vm.steps import say

RUNS = BUILD / "vm"
KEEP_RUNS_SECONDS = 24 * 3600
MODULE_NAME = "mergemem"
Output = Callable[[bytes], object]


class GuestError(Exception):
    """The base of every verdict that is not a success; `exit_status` is what a shell sees."""

    exit_status = 1


class CommandFailed(GuestError):
    """The command ended with a status other than zero."""


class KernelLogFindings(GuestError):
    """The kernel complained; it counts even when the command succeeded."""

    exit_status = 122


class GuestLost(GuestError):
    """The guest ended without a verdict: panic, hang of the emulator, killed from outside."""

    exit_status = 123


class GuestTimeout(GuestError):
    """The guest was still running at its time limit. 124 is what timeout(1) returns."""

    exit_status = 124


@dataclass(frozen=True)
class Result:
    """A guest that ran to its end."""

    status: int
    kernel_log_findings: tuple[str, ...]
    duration_seconds: float
    accelerator: str
    kernel: str
    release: str
    directory: Path

    @property
    def output(self) -> bytes:
        return (self.directory / "output.log").read_bytes()

    @property
    def kernel_log(self) -> str:
        return _read(self.directory / "dmesg")

    def check(self) -> Result:
        """Raise what is wrong, if anything is."""
        if self.kernel_log_findings:
            raise KernelLogFindings(
                f"kernel {self.release}: the kernel log has findings "
                f"(command's status {self.status})\n{log.report(self.kernel_log_findings)}"
            )
        if self.status:
            failed = CommandFailed(f"kernel {self.release}: exit status {self.status}")
            failed.exit_status = self.status
            raise failed
        return self


@dataclass(frozen=True, kw_only=True)
class Guest:
    """A virtual machine to run commands in; every run boots afresh."""

    kernel: str | Kernel = "newest"
    cpus: int = 2
    memory_mib: int = 2048
    # A second NUMA node, besides that: memory without processors, so that the first node's is
    # taken unless somebody asks for this one's.
    far_memory_mib: int = 0
    swap_mib: int = 0
    # The module is built and its path is in $MERGEMEM_KO; loaded only if asked.
    module: bool = True
    load_module: bool = False
    module_parameters: str = ""
    kernel_parameters: Sequence[str] = ()
    qemu_arguments: Sequence[str] = ()
    # None: what the probe says.
    accelerator: str | None = None
    # Patterns of kernel log lines that the command provokes on purpose.
    allow_in_log: Sequence[str] = ()

    def run(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path = CHECKOUT,
        time_limit_seconds: float = 600,
        output: Output | None = None,
    ) -> Result:
        """Run a command (a string is for the shell) as root and wait for the verdict.

        Its output is streamed to `output` (by default to ours) and kept in `output.log`.
        """
        return self._boot(command, env or {}, cwd, time_limit_seconds, output or _to_stdout, False)

    def shell(self, env: Mapping[str, str] | None = None) -> Result:
        """A shell in the guest, on our terminal."""
        say("a root shell in the guest; leave it with 'exit'")
        return self._boot(["/bin/bash"], env or {}, CHECKOUT, float("inf"), _to_stdout, True)

    def _boot(
        self,
        command: str | Sequence[str],
        env: Mapping[str, str],
        cwd: Path,
        limit_seconds: float,
        output: Output,
        interactive: bool,
    ) -> Result:
        kernel = self.kernel if isinstance(self.kernel, Kernel) else find(self.kernel)
        unpacked = tree.get(kernel)
        accel = self.accelerator or accelerator.choose()
        directory = _new_run_directory(kernel.name)
        env = {"MERGEMEM_KERNEL": kernel.name, "MERGEMEM_ACCELERATOR": accel} | dict(env)
        settings = {
            "CHECKOUT": str(CHECKOUT),
            "CACHE": str(cache_dir()),
            "MODULE_NAME": MODULE_NAME,
            "INTERACTIVE": "1" if interactive else "",
            "SWAP": "1" if self.swap_mib else "",
        }
        if self.module:
            # A copy, so that a build in the meantime doesn't change it under the guest.
            module = shutil.copy(build.module(unpacked), directory / f"{MODULE_NAME}.ko")
            env["MERGEMEM_KO"] = str(module)
            settings["MODULE"] = str(module)
            settings["LOAD_MODULE"] = "1" if self.load_module else ""
            settings["MODULE_PARAMETERS"] = self.module_parameters
        if interactive:
            columns, rows = shutil.get_terminal_size()
            settings |= {"ROWS": str(rows), "COLUMNS": str(columns)}
        _write_settings(directory / "settings", settings)
        _write_command(directory / "command", command, env, cwd)

        qemu = self._qemu(unpacked, directory, accel, interactive)
        for attempt in (1, 2):
            started = time.monotonic()
            in_time = _run_qemu(qemu, directory, started + limit_seconds, output, interactive)
            duration = time.monotonic() - started
            console = _read(directory / "qemu.log") + _read(directory / "console.log")
            if (directory / "status").exists() or not in_time:
                break
            # Emulators have been seen to lose a guest while it boots (see README.md here). What
            # dies later is a finding about our code.
            if (directory / "started").exists() or attempt == 2:
                break
            say(f"kernel {unpacked.release}: the guest died before its init ran; starting it again")
            say(log.tail(console))

        text = _read(directory / "dmesg") + "\n" + console
        found = log.findings(text, self.allow_in_log)
        found += tuple(_read(directory / "findings").splitlines())
        where = f"kernel {unpacked.release} after {duration:.0f} s, in {directory}"
        story = f"{where}\n{log.report(found)}\n{log.tail(console)}"
        if not in_time:
            raise GuestTimeout(f"time limit: {story}")
        try:
            status = int(_read(directory / "status"))
        except ValueError:
            raise GuestLost(f"the guest was lost: {story}") from None
        return Result(status, found, duration, accel, kernel.name, unpacked.release, directory)

    def _qemu(
        self, unpacked: tree.Tree, directory: Path, accel: str, interactive: bool
    ) -> list[str]:
        shares = {
            "control": (directory, ""),
            "host": (Path("/"), ",readonly=on"),
            "kernel": (unpacked.root, ",readonly=on"),
            "checkout": (CHECKOUT, ""),
        }
        parameters = [
            "console=ttyS0",
            # Warnings and worse on the console, which is slow; the guest's dmesg has the rest.
            "loglevel=5",
            "log_buf_len=4M",
            # A kernel bug ends the run at once, and -no-reboot makes that an exit of QEMU.
            "oops=panic",
            "panic=-1",
            # A busy host can keep an emulated processor waiting; stalls of minutes are real.
            "watchdog_thresh=60",
            "rcupdate.rcu_cpu_stall_timeout=120",
            # Its hinting faults would come at random moments; who wants them turns it on.
            "numa_balancing=disable",
            # The debug kernel dies now and then if an interrupt meets it while it finds out about
            # its processor's page tables of five levels (KASAN asks where its shadow is).
            "no5lvl",
            *self.kernel_parameters,
        ]
        words = [*emulator.command(), "-nodefaults", "-no-user-config", "-no-reboot"]
        words += ["-display", "none", "-machine", "q35", *accelerator.arguments(accel)]
        words += ["-smp", str(self.cpus), *self._memory()]
        words += ["-kernel", str(unpacked.image), "-initrd", str(initramfs.make(unpacked))]
        words += ["-append", " ".join(parameters)]
        words += ["-serial", f"file:{directory}/console.log"]
        words += ["-chardev", f"stdio,id=command,signal={'off' if interactive else 'on'}"]
        words += ["-serial", "chardev:command"]
        for tag, (path, options) in shares.items():
            source = f"local,id={tag},path={path},security_model=none,multidevs=remap{options}"
            words += ["-fsdev", source, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
        if self.swap_mib:
            with open(directory / "swap", "wb") as swap:
                swap.truncate(self.swap_mib << 20)
            words += ["-drive", f"file={directory}/swap,format=raw,if=none,id=swap"]
            words += ["-device", "virtio-blk-pci,drive=swap"]
        return [*words, *self.qemu_arguments]

    def _memory(self) -> list[str]:
        words = ["-m", str(self.memory_mib + self.far_memory_mib)]
        if self.far_memory_mib:
            nodes = {"near": self.memory_mib, "far": self.far_memory_mib}
            processors = {"near": f",cpus=0-{self.cpus - 1}", "far": ""}
            for name, mib in nodes.items():
                words += ["-object", f"memory-backend-ram,id={name},size={mib}M"]
                words += ["-numa", f"node,memdev={name}{processors[name]}"]
        return words


def run_in_guest(
    kernel: str,
    command: str | Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    time_limit_seconds: float = 600,
) -> Result:
    """Run a command on a kernel of the table, in a guest of the default shape."""
    return Guest(kernel=kernel).run(command, env=env, time_limit_seconds=time_limit_seconds)


def _run_qemu(
    words: Sequence[str], directory: Path, deadline: float, output: Output, interactive: bool
) -> bool:
    """Run QEMU to its end, or to the deadline: then False."""
    # setpriv: QEMU dies with us, however we die.
    words = ["setpriv", "--pdeathsig", "KILL", *words]
    (directory / "qemu").write_text(shlex.join(words) + "\n", encoding="utf-8")
    if interactive:
        return subprocess.run(words).returncode is not None
    with (
        open(directory / "output.log", "wb") as kept,
        open(directory / "qemu.log", "wb") as errors,
        # Its own session: an interrupt from the keyboard is ours to handle.
        subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        ) as qemu,
    ):
        assert qemu.stdout is not None
        try:
            for chunk in _chunks(qemu.stdout.fileno(), deadline):
                kept.write(chunk)
                kept.flush()
                output(chunk)
            qemu.wait(timeout=max(0.1, deadline - time.monotonic()))
            return True
        except (TimeoutError, subprocess.TimeoutExpired):
            return False
        finally:
            qemu.kill()


def _chunks(descriptor: int, deadline: float) -> Iterator[bytes]:
    """What arrives on a pipe until its end; TimeoutError at the deadline."""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            chunk = os.read(descriptor, 65536)
            if not chunk:
                return
            yield chunk


def _to_stdout(chunk: bytes) -> None:
    sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()


def _new_run_directory(kernel: str) -> Path:
    RUNS.mkdir(parents=True, exist_ok=True)
    for old in RUNS.iterdir():
        if time.time() - old.stat().st_mtime > KEEP_RUNS_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{kernel}-", dir=RUNS))
    directory.chmod(0o755)
    return directory


def _write_settings(path: Path, settings: Mapping[str, str]) -> None:
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in settings.items()]
    path.write_text("".join(lines), encoding="utf-8")


def _write_command(
    path: Path, command: str | Sequence[str], env: Mapping[str, str], cwd: Path
) -> None:
    # No colours into a log file; the guest sees a terminal in any case.
    terminal = os.environ.get("TERM", "dumb") if sys.stdout.isatty() else "dumb"
    base = {"HOME": "/root", "USER": "root", "LANG": "C.UTF-8", "TERM": terminal}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in (base | dict(env)).items()]
    lines.append(f"cd {shlex.quote(str(cwd))} || exit 126")
    if isinstance(command, str):
        lines.append(f"exec /bin/bash -c {shlex.quote(command)}")
    else:
        lines.append(f"exec {shlex.join(command)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
