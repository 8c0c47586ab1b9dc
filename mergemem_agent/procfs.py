# SPDX-License-Identifier: MIT
"""Which processes run, and what they have mapped, out of /proc.

This is read every few seconds on hosts with hundreds of processes, hence three rules: plain system
calls and nothing parsed that nobody asks for; `ProcFs.process_ids()` reads one small file of each
process, all the rest only `ProcFs.process()` of the new ones; and every file of a process is opened
through one descriptor of its directory, so that what is read together belongs together: when the
process ends, that descriptor goes stale, and never leads to a newcomer with the same pid.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mergemem_agent.error import PermissionDenied, ProcessGone

__all__ = ["Mapping", "PermissionDenied", "ProcFs", "Process", "ProcessGone", "ProcessId"]

PAGE_BYTES = 4096

# A process may give itself a command line of megabytes, and policies search it with regular
# expressions, whose time may grow with its square. What tells services apart comes early.
COMMAND_LINE_BYTES = 4096

# Private, without a file, and yet no memory of the process: pages of the kernel's own.
SPECIAL_NAMES = frozenset(
    {"[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[vectors]", "[sigpage]", "[uprobes]"}
)

_CLOCK_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PF_KTHREAD = 0x00200000  # include/linux/sched.h, bit of field 9 of /proc/PID/stat
_DELETED = " (deleted)"
_GONE = (FileNotFoundError, ProcessLookupError)


@dataclass(frozen=True, order=True)
class ProcessId:
    """A process beyond doubt: a recycled pid has another start time.

    `start_time_ticks` is field 22 of /proc/PID/stat, in clock ticks since boot.
    """

    pid: int
    start_time_ticks: int


@dataclass(frozen=True)
class Process:
    """What policies choose processes by, as it was when `ProcFs.process()` looked.

    `uid` is the real user. `executable` is empty where it may not be read; an executable that was
    replaced on disk since keeps its old name. `cgroup` is the path in the unified hierarchy, and
    in systemd's where that tells nothing ("/" where neither does). `anonymous_bytes` counts
    anonymous memory that is resident. `command_line` is cut after `COMMAND_LINE_BYTES`.
    """

    id: ProcessId
    parent_pid: int
    uid: int
    executable: str
    command_line: tuple[str, ...]
    cgroup: str
    anonymous_bytes: int
    age_seconds: float
    kernel_thread: bool


@dataclass(frozen=True)
class Mapping:
    """One line of /proc/PID/maps: the addresses from `start` up to, not including, `end`.

    `flags` holds the two-letter codes of VmFlags in /proc/PID/smaps (see proc_pid_smaps(5)), and
    is empty unless asked for, since the kernel walks all page tables to write that file.
    """

    start: int
    end: int
    permissions: str
    inode: int
    name: str
    flags: frozenset[str]

    @property
    def pages(self) -> int:
        """Length in pages, resident or not."""
        return (self.end - self.start) // PAGE_BYTES

    @property
    def anonymous(self) -> bool:
        """Whether it is private memory of the process, of the only kind that can be merged."""
        return self.permissions[3] == "p" and self.inode == 0 and self.name not in SPECIAL_NAMES


class ProcFs:
    """A mounted proc file system, at `root`."""

    def __init__(self, root: Path = Path("/proc")) -> None:
        """Touch nothing yet."""
        self._root = os.fspath(root)

    def process_ids(self) -> list[ProcessId]:
        """Return all processes that this user can see, kernel threads too, in order of pid."""
        found = []
        for name in os.listdir(self._root):
            if name.isdecimal():
                # Whoever vanished between the listing and the reading is simply not there.
                with contextlib.suppress(*_GONE, PermissionError):
                    stat = _stat_fields(_read_file(f"{self._root}/{name}/stat"))
                    found.append(ProcessId(int(name), int(stat[_STAT_START_TIME])))
        found.sort()
        return found

    def process(self, pid: int) -> Process | None:
        """Return what policies want to know of one process; None if it is gone or hidden."""
        try:
            with self._directory(pid) as directory:
                stat = _stat_fields(_read_file("stat", directory))
                uid, _, anonymous_bytes = _status(_read_file("status", directory))
                start_time_ticks = int(stat[_STAT_START_TIME])
                kernel_thread = bool(int(stat[_STAT_FLAGS]) & _PF_KTHREAD)
                return Process(
                    id=ProcessId(pid, start_time_ticks),
                    parent_pid=int(stat[_STAT_PARENT]),
                    uid=uid,
                    executable="" if kernel_thread else _executable(directory),
                    command_line=() if kernel_thread else _command_line(directory),
                    cgroup=_cgroup(directory),
                    anonymous_bytes=anonymous_bytes,
                    age_seconds=self._age_seconds(start_time_ticks),
                    kernel_thread=kernel_thread,
                )
        except (*_GONE, PermissionError):  # permission: /proc may be mounted with hidepid
            return None

    def mappings(
        self, pid: int, with_flags: bool = False, anonymous: bool = False
    ) -> list[Mapping]:
        """Return all mappings of a process in ascending order; none for a kernel thread.

        With `anonymous` only private ones without a file: the many others, of libraries, are passed
        over at a glance. Raises ProcessGone, and PermissionDenied where the caller may not look
        into the process.
        """
        try:
            with self._directory(pid) as directory:
                if with_flags:
                    return list(_parse_smaps(_read_file("smaps", directory)))
                maps = _read_file("maps", directory)
                lines = _ANONYMOUS.findall(maps) if anonymous else maps.split(b"\n")
                return [_parse_mapping(line) for line in lines if line]
        except PermissionError:
            raise PermissionDenied(
                f"may not read the mappings of process {pid}",
                "run as root, or with CAP_SYS_PTRACE",
            ) from None
        except _GONE:
            raise ProcessGone(f"there is no process {pid}, or no longer") from None

    def dumpable(self, pid: int) -> bool | None:
        """Return whether a process is dumpable (prctl(2), PR_SET_DUMPABLE); None: cannot be told.

        The kernel gives the files of a process that is not dumpable, though not their directory,
        to root of the process's user namespace (proc_pid(5)). So nothing can be told of processes
        that run as that root themselves. Raises ProcessGone.
        """
        try:
            with self._directory(pid) as directory:
                owner = os.stat("stat", dir_fd=directory).st_uid
                _, effective_uid, _ = _status(_read_file("status", directory))
                if owner != effective_uid:
                    return False
                return None if owner == _namespace_root(directory) else True
        except _GONE:
            raise ProcessGone(f"there is no process {pid}, or no longer") from None

    @contextlib.contextmanager
    def _directory(self, pid: int) -> Iterator[int]:
        descriptor = os.open(f"{self._root}/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _age_seconds(self, start_time_ticks: int) -> float:
        # /proc/uptime and start times follow the same clock, in a time namespace too.
        uptime_seconds = float(_read_file(f"{self._root}/uptime").split(None, 1)[0])
        return max(0.0, uptime_seconds - start_time_ticks / _CLOCK_TICKS_PER_SECOND)


def _read_file(path: str, directory: int | None = None, limit_bytes: int = 1 << 30) -> bytes:
    """Read a whole file, or its first bytes. The files of /proc have no size to go by."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        # Most files fit here at once; the second read, which finds the end, costs a microsecond.
        chunks = []
        while limit_bytes > 0 and (chunk := os.read(descriptor, min(limit_bytes, 65536))):
            chunks.append(chunk)
            limit_bytes -= len(chunk)
        return b"".join(chunks)
    finally:
        os.close(descriptor)


# Fields of /proc/PID/stat as proc_pid_stat(5) numbers them, from the third on (state).
_STAT_PARENT = 4 - 3
_STAT_FLAGS = 9 - 3
_STAT_START_TIME = 22 - 3


def _stat_fields(stat: bytes) -> list[bytes]:
    """Split /proc/PID/stat from its third field on.

    The second is the name, which may hold blanks, parentheses and newlines; what follows may not,
    so the last parenthesis is the one that closes it.
    """
    fields = stat[stat.rfind(b")") + 1 :].split(None, _STAT_START_TIME + 1)
    if len(fields) <= _STAT_START_TIME:
        # A process that dies while it is read can leave an empty file.
        raise ProcessLookupError("incomplete /proc/PID/stat")
    return fields


def _status(status: bytes) -> tuple[int, int, int]:
    """Return real uid, effective uid and resident anonymous bytes.

    The one free text of the file is the name on its first line, in which newlines are escaped.
    """
    user = status.find(b"\nUid:")
    if user < 0:
        raise ProcessLookupError("incomplete /proc/PID/status")
    real, effective = status[user + 5 :].split(None, 2)[:2]
    anonymous = status.find(b"\nRssAnon:")  # no memory, no line: a zombie, a kernel thread
    kibibytes = int(status[anonymous + 9 :].split(None, 1)[0]) if anonymous >= 0 else 0
    return int(real), int(effective), kibibytes * 1024


def _executable(directory: int) -> str:
    try:
        # A package upgrade replaces executables under running services: still the same service.
        return os.readlink("exe", dir_fd=directory).removesuffix(_DELETED)
    except OSError:
        return ""


def _command_line(directory: int) -> tuple[str, ...]:
    line = _read_file("cmdline", directory, COMMAND_LINE_BYTES)
    # Programs that rewrite their title may end it with any number of zeros, or with none.
    return tuple(os.fsdecode(word) for word in line.rstrip(b"\0").split(b"\0")) if line else ()


def _cgroup(directory: int) -> str:
    unified = systemd = "/"
    for line in os.fsdecode(_read_file("cgroup", directory)).split("\n"):
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":
            unified = path
        elif controllers == "name=systemd":
            systemd = path
    # Hosts that still use cgroup v1 tell containers apart in systemd's hierarchy only. To say "/"
    # for all of them would put them into one domain.
    return systemd if unified == "/" else unified


def _namespace_root(directory: int) -> int | None:
    """Return which uid, as seen from here, is root of the process's user namespace."""
    for line in _read_file("uid_map", directory).splitlines():
        inside, outside, _ = line.split()
        if int(inside) == 0:
            return int(outside)
    return None


# Lines of maps with the permission p and the inode 0. Not splitlines() for the others: names may
# hold a carriage return.
_ANONYMOUS = re.compile(
    rb"^[0-9a-f]+-[0-9a-f]+ ...p [0-9a-f]+ [0-9a-f]+:[0-9a-f]+ 0(?: .*)?$", re.M
)


def _parse_mapping(line: bytes, flags: frozenset[str] = frozenset()) -> Mapping:
    """Parse one line of maps. Newlines in names are escaped, and blanks only end the others."""
    fields = line.split(None, 5)
    start, _, end = fields[0].partition(b"-")
    return Mapping(
        start=int(start, 16),
        end=int(end, 16),
        permissions=fields[1].decode("ascii"),
        inode=int(fields[4]),
        name=os.fsdecode(fields[5]) if len(fields) > 5 else "",
        flags=flags,
    )


def _parse_smaps(smaps: bytes) -> Iterator[Mapping]:
    # Each mapping is its line of maps, then lines "Key: value", of which VmFlags is the last.
    header = b""
    for line in smaps.split(b"\n"):
        if line.startswith(b"VmFlags:"):
            yield _parse_mapping(header, frozenset(line[8:].decode("ascii").split()))
        elif line and not line[:1].isupper():
            header = line
