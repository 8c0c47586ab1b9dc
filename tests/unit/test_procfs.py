# SPDX-License-Identifier: MIT
"""procfs against the machine's own /proc, and against made-up ones with odd processes in them."""

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergemem_agent import procfs
from mergemem_agent.error import PermissionDenied, ProcessGone
from mergemem_agent.procfs import Process, ProcessId, ProcFs

PR_SET_DUMPABLE = 4
NOBODY = 65534


class FakeProc:
    """A directory that looks like /proc as far as ProcFs reads it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "uptime").write_text("1000.50 3000.00\n")
        (root / "meminfo").write_text("MemTotal: 1 kB\n")

    def add(
        self,
        pid: int,
        name: str = "web",
        start_time_ticks: int = 50000,
        flags: int = 0x400000,
        cgroup: str = "0::/system.slice/web.service\n",
        cmdline: bytes = b"web\0--serve\0",
        maps: str = "",
        smaps: str = "",
        exe: str = "/usr/bin/web",
        rss_anon: str = "RssAnon:\t    2048 kB\n",
    ) -> Path:
        directory = self.root / str(pid)
        directory.mkdir()
        fields = [str(pid), f"({name})", "S", "7", "1", "1", "0", "-1", str(flags)]
        fields += ["0"] * (21 - len(fields)) + [str(start_time_ticks), "0", "0"]
        (directory / "stat").write_text(" ".join(fields) + "\n")
        (directory / "status").write_text(
            f"Name:\t{name.splitlines()[0]}\nPPid:\t7\nUid:\t1000\t1001\t1002\t1003\n{rss_anon}"
        )
        (directory / "cmdline").write_bytes(cmdline)
        (directory / "cgroup").write_text(cgroup)
        (directory / "maps").write_text(maps)
        (directory / "smaps").write_text(smaps)
        if exe:
            (directory / "exe").symlink_to(exe)
        return directory


@pytest.fixture
def fake(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def read(fake: FakeProc, pid: int) -> Process:
    process = ProcFs(fake.root).process(pid)
    assert process is not None
    return process


# --- made-up processes ---------------------------------------------------------------------------


def test_everything_of_an_ordinary_process(fake: FakeProc) -> None:
    fake.add(42)
    age_seconds = 1000.5 - 50000 / os.sysconf("SC_CLK_TCK")
    assert read(fake, 42) == Process(
        id=ProcessId(42, 50000),
        parent_pid=7,
        uid=1000,
        executable="/usr/bin/web",
        command_line=("web", "--serve"),
        cgroup="/system.slice/web.service",
        anonymous_bytes=2048 * 1024,
        age_seconds=age_seconds,
        kernel_thread=False,
    )


@pytest.mark.parametrize("name", ["a b", ") (", "x) S 1 2 3", "two\nlines", "(((", "", "é"])
def test_names_of_any_kind(fake: FakeProc, name: str) -> None:
    fake.add(42, name=name or "x")
    if not name:
        stat = fake.root / "42" / "stat"
        stat.write_text(stat.read_text().replace("(x)", "()"))
    assert ProcFs(fake.root).process_ids() == [ProcessId(42, 50000)]
    assert read(fake, 42).parent_pid == 7


def test_ids_are_in_order_and_of_processes_only(fake: FakeProc) -> None:
    for pid in (100, 9, 20):
        fake.add(pid)
    (fake.root / "self").symlink_to("9")
    assert [each.pid for each in ProcFs(fake.root).process_ids()] == [9, 20, 100]


def test_a_process_that_vanishes_while_it_is_read(fake: FakeProc) -> None:
    fake.add(1)
    for missing in ("stat", "status", "cmdline", "cgroup"):
        directory = fake.add(2)
        (directory / missing).unlink()
        assert ProcFs(fake.root).process(2) is None, missing
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
    directory = fake.add(2)
    (directory / "stat").write_text("")
    (directory / "status").write_text("")
    assert ProcFs(fake.root).process_ids() == [ProcessId(1, 50000)]
    assert ProcFs(fake.root).process(2) is None
    assert ProcFs(fake.root).process(3) is None


def test_mappings_of_nobody(fake: FakeProc) -> None:
    for with_flags in (False, True):
        with pytest.raises(ProcessGone, match="no process 3"):
            ProcFs(fake.root).mappings(3, with_flags)
    with pytest.raises(ProcessGone):
        ProcFs(fake.root).dumpable(3)


def test_no_executable(fake: FakeProc) -> None:
    fake.add(42, exe="")
    assert read(fake, 42).executable == ""


def test_an_executable_that_was_replaced(fake: FakeProc) -> None:
    fake.add(42, exe="/usr/bin/web (deleted)")
    assert read(fake, 42).executable == "/usr/bin/web"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ()),
        (b"gunicorn: worker [app]\0\0\0\0", ("gunicorn: worker [app]",)),
        (b"no end", ("no end",)),
        (b"a\0\0b\0", ("a", "", "b")),
        (b"\xff\0", ("\udcff",)),
        (b"\0", ("",)),
    ],
)
def test_command_lines(fake: FakeProc, content: bytes, words: tuple[str, ...]) -> None:
    fake.add(42, cmdline=content)
    assert read(fake, 42).command_line == words


def test_a_command_line_of_megabytes_is_cut(fake: FakeProc) -> None:
    fake.add(42, cmdline=b"x" * 3_000_000)
    assert read(fake, 42).command_line == ("x" * procfs.COMMAND_LINE_BYTES,)


@pytest.mark.parametrize(
    ("content", "path"),
    [
        ("0::/\n", "/"),
        ("", "/"),
        ("0::/a:b/c d\n", "/a:b/c d"),
        ("5:memory:/m\n1:name=systemd:/system.slice/x.service\n0::/\n", "/system.slice/x.service"),
        ("1:name=systemd:/old\n0::/new\n", "/new"),
        ("4:cpu,cpuacct:/docker/1\n", "/"),
    ],
)
def test_cgroups(fake: FakeProc, content: str, path: str) -> None:
    fake.add(42, cgroup=content)
    assert read(fake, 42).cgroup == path


def test_a_kernel_thread(fake: FakeProc) -> None:
    fake.add(2, name="kthreadd", flags=0x208040, exe="", cmdline=b"", rss_anon="")
    process = read(fake, 2)
    assert process.kernel_thread
    assert (process.executable, process.command_line, process.anonymous_bytes) == ("", (), 0)


def test_a_name_cannot_forge_the_status(fake: FakeProc) -> None:
    """The kernel escapes newlines there, so a name never begins a line."""
    directory = fake.add(42)
    status = directory / "status"
    status.write_text(status.read_text().replace("web", r"\nUid:\t0\t0\t0\t0 Uid:", 1))
    assert read(fake, 42).uid == 1000


MAPS = """\
00400000-00402000 r-xp 00000000 fe:01 130 /usr/bin/with two  blanks
00e00000-00e21000 rw-p 00000000 00:00 0 [heap]
7f0000000000-7f0000003000 rw-p 00000000 00:00 0 
7f0000003000-7f0000004000 rw-s 00000000 00:01 7                          /dev/zero (deleted)
7f0000004000-7f0000005000 rw-p 00000000 00:00 0                          [anon:malloc arena]
7f0000005000-7f0000006000 r--p 00000000 00:00 0                          [vvar]
7f0000006000-7f0000007000 r-xp 00000000 00:00 0                          [vdso]
7f0000007000-7f0000008000 rw-p 00000000 fe:01 131                        /a\\012b\rc
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
"""  # noqa: W291


def test_maps(fake: FakeProc) -> None:
    fake.add(42)
    (fake.root / "42" / "maps").write_bytes(MAPS.encode())
    mappings = ProcFs(fake.root).mappings(42)
    assert [(each.name, each.inode, each.pages, each.anonymous) for each in mappings] == [
        ("/usr/bin/with two  blanks", 130, 2, False),
        ("[heap]", 0, 33, True),
        ("", 0, 3, True),
        ("/dev/zero (deleted)", 7, 1, False),
        ("[anon:malloc arena]", 0, 1, True),
        ("[vvar]", 0, 1, False),
        ("[vdso]", 0, 1, False),
        ("/a\\012b\rc", 131, 1, False),
        ("[vsyscall]", 0, 1, False),
    ]
    assert mappings[2].start == 0x7F0000000000
    assert mappings[2].end == 0x7F0000003000
    assert mappings[2].permissions == "rw-p"
    assert {each.flags for each in mappings} == {frozenset()}


def test_only_what_may_be_anonymous_is_picked_out(fake: FakeProc) -> None:
    fake.add(42)
    (fake.root / "42" / "maps").write_bytes(MAPS.encode())
    picked = ProcFs(fake.root).mappings(42, anonymous=True)
    of_all = ProcFs(fake.root).mappings(42)
    assert picked == [each for each in of_all if each.permissions[3] == "p" and not each.inode]
    assert len(picked) == 6


def test_smaps_have_the_same_mappings_and_flags(fake: FakeProc) -> None:
    smaps = "".join(
        f"{line}\nSize:                  8 kB\nTHPeligible:           0\nVmFlags: rd {flag} \n"
        for line, flag in zip(MAPS.split("\n"), ("ex", "dd", "wf", "sh", *["ac"] * 5), strict=False)
        if line
    )
    fake.add(42)
    (fake.root / "42" / "maps").write_bytes(MAPS.encode())
    (fake.root / "42" / "smaps").write_bytes(smaps.encode())
    plain = ProcFs(fake.root).mappings(42)
    flagged = ProcFs(fake.root).mappings(42, with_flags=True)
    assert [(each.start, each.name) for each in flagged] == [
        (each.start, each.name) for each in plain
    ]
    assert flagged[1].flags == {"rd", "dd"}


# --- the machine's own ---------------------------------------------------------------------------


def test_this_very_process() -> None:
    process = ProcFs().process(os.getpid())
    assert process is not None
    assert process.executable == os.path.realpath(sys.executable)
    assert process.parent_pid == os.getppid()
    assert process.uid == os.getuid()
    assert 0 <= process.age_seconds < time.clock_gettime(time.CLOCK_BOOTTIME)
    assert process.anonymous_bytes > 1 << 20
    assert not process.kernel_thread
    assert process.id in ProcFs().process_ids()


def test_every_process_of_the_machine_can_be_read() -> None:
    reader = ProcFs()
    for identity in reader.process_ids():
        process = reader.process(identity.pid)
        assert process is None or process.id.pid == identity.pid
        if process is not None and process.kernel_thread:
            assert process.command_line == ()
            assert process.anonymous_bytes == 0


def test_own_mappings() -> None:
    with mmap.mmap(-1, 5 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_DONTDUMP)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for with_flags in (False, True):
            mapping = next(
                each
                for each in ProcFs().mappings(os.getpid(), with_flags)
                if each.start <= address < each.end
            )
            assert mapping.anonymous
            assert mapping.pages >= 5
            assert ("dd" in mapping.flags) == with_flags


def test_a_zombie_has_no_mappings_and_then_is_gone(sleeper: subprocess.Popen[bytes]) -> None:
    reader = ProcFs()
    assert reader.mappings(sleeper.pid)
    sleeper.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    zombie = reader.process(sleeper.pid)
    assert zombie is not None
    assert (zombie.anonymous_bytes, zombie.executable) == (0, "")
    assert reader.mappings(sleeper.pid) == []
    sleeper.wait()
    assert reader.process(sleeper.pid) is None


def test_processes_that_come_and_go_are_no_errors() -> None:
    command = ["sh", "-c", "i=0; while [ $i -lt 300 ]; do /bin/true & i=$((i+1)); done; wait"]
    reader = ProcFs()
    with subprocess.Popen(command) as storm:
        seen = 0
        while storm.poll() is None:
            for identity in reader.process_ids():
                seen += reader.process(identity.pid) is not None
                try:
                    reader.mappings(identity.pid)
                except (ProcessGone, PermissionDenied):
                    continue
    assert seen


@pytest.mark.skipif(os.getuid() != 0, reason="changes its user")
def test_dumpable_and_permission_as_another_user() -> None:
    """A child without root's powers, which has changed its user without exec: not dumpable."""
    with mmap.mmap(-1, 4096) as board:
        child = os.fork()
        if child == 0:
            try:
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
                board[0] = _as_nobody()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert board[0] == 0b1111


def _as_nobody() -> int:
    reader, me, libc = ProcFs(), os.getpid(), ctypes.CDLL(None)
    answers = [reader.dumpable(me) is False]
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    answers.append(reader.dumpable(me) is True)
    try:
        reader.mappings(os.getppid())
    except PermissionDenied as error:
        answers.append("CAP_SYS_PTRACE" in error.hint)
    parent = reader.process(os.getppid())
    answers.append(parent is not None and parent.executable == "" and parent.uid == 0)
    return sum(answer << bit for bit, answer in enumerate(answers))


@pytest.mark.skipif(os.getuid() != 0, reason="needs a process of root")
def test_of_root_it_cannot_be_told() -> None:
    assert ProcFs().dumpable(os.getpid()) is None
