# SPDX-License-Identifier: MIT
"""Work in a process of its own, with whatever that starts: none of it outlives its time.

    control group ── the process that does the work, a fork of ours: nothing is imported again
                       ├── programs that it starts
                       └── ... and those whose parents have gone

At the end, or when the time is up, all that is still in the group is killed in one go, however it
has been orphaned, renamed or daemonised meanwhile; and what a killed program leaves in memory
(files, System V segments) is removed.
"""

from __future__ import annotations

import itertools
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")
# The end of a killed family: on the debug kernel, freeing 1 GiB takes a while.
END_SECONDS = 120.0
# A group whose processes do not end stays.
_numbers = itertools.count()


class Undying(Exception):
    """Killed, and still there: somebody sleeps in the kernel for ever."""


def run(work: Callable[[], int], seconds: float) -> int | None:
    """Do it; its exit status, or None if it was killed when its time was up. Raises Undying."""
    # Files in memory may stay behind for a while: they shall be no debt of a group that has gone.
    (GROUPS / "cgroup.subtree_control").write_text("-memory")
    group = GROUPS / f"soak-{os.getpid()}-{next(_numbers)}"
    group.mkdir()
    home = Path(tempfile.mkdtemp(prefix="soak-"))
    # Databases refuse to be root's.
    home.chmod(0o777)
    before = set(SHARED_MEMORY.iterdir())
    pid = _start(work, group, home)
    try:
        return _wait(pid, seconds)
    finally:
        _end(group)
        # After a kill. If it has ended by itself, it has been waited for.
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
        group.rmdir()
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run(["ipcrm", "--all"], check=True)
        for file in set(SHARED_MEMORY.iterdir()) - before:
            file.unlink(missing_ok=True)


def _start(work: Callable[[], int], group: Path, home: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        (group / "cgroup.procs").write_text("0")
        tempfile.tempdir = str(home)
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _wait(pid: int, seconds: float) -> int | None:
    descriptor = os.pidfd_open(pid)
    try:
        ended, _, _ = select.select([descriptor], [], [], max(0.0, seconds))
    finally:
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if ended else None


def _end(group: Path) -> None:
    (group / "cgroup.kill").write_text("1")
    deadline = time.monotonic() + END_SECONDS
    while "populated 0" not in (group / "cgroup.events").read_text():
        if time.monotonic() > deadline:
            raise Undying(
                "\n".join(map(_whereabouts, (group / "cgroup.procs").read_text().split()))
            )
        time.sleep(0.1)


def _whereabouts(pid: str) -> str:
    """Where in the kernel a process is."""
    lines = [f"process {pid}"]
    for name in ("comm", "stack"):
        with suppress(OSError):
            lines.append(Path(f"/proc/{pid}/{name}").read_text().rstrip())
    return "\n".join(lines)
