# SPDX-License-Identifier: MIT
"""Where a judge runs its programs: a directory, an environment, a time, a transcript."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from tests.judges import provision

# Emulated, a program may be far from done when its time is up.
GRACE_SECONDS = 900
TOLD_CHARACTERS = 1500
POSTGRES_PROGRAMS = "usr/lib/postgresql/15/bin"
# "nobody": databases refuse to run as root.
UNPRIVILEGED = 65534


class Wrong(Exception):
    """The judge has found wrong results."""

    def __init__(self, text: str, count: int = 1) -> None:
        super().__init__(text)
        self.count = count


class NotRun(Exception):
    """The judge could not do its work here, which says nothing of its results."""


def environment(directory: Path) -> dict[str, str]:
    """Of every program of a judge."""
    root = provision.root()
    programs = [root / "usr/bin", root / POSTGRES_PROGRAMS]
    paths = [*map(str, programs), "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
    return {
        "PATH": ":".join(paths),
        "LD_LIBRARY_PATH": str(root / "usr/lib/x86_64-linux-gnu"),
        "HOME": str(directory),
        "TMPDIR": str(directory),
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@dataclass
class Place:
    """One run of one judge."""

    directory: Path
    seconds: float
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        _open_way(provision.root())

    @property
    def time_left(self) -> float:
        """Seconds until it should be done."""
        return self.started + self.seconds - time.monotonic()

    def start(
        self,
        *words: str | Path,
        user: int | None = None,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        same_addresses: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Start a program; finish() waits for it.

        With the same addresses in all of them, pages full of pointers are equal, too.
        """
        if same_addresses:
            words = ("setarch", "-R", *words)
        # The lists of groups are root's otherwise.
        groups: Sequence[int] | None = [] if user is not None else None
        return subprocess.Popen(
            words,
            cwd=self.directory,
            env=environment(self.directory) | dict(env or {}),
            user=user,
            group=user,
            extra_groups=groups,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Or it would be vfork(): the child shares our memory until it executes, and the merger
            # would merge ours with it.
            preexec_fn=_nothing,
        )

    def finish(self, program: subprocess.Popen[bytes], say: bytes | None = None) -> str:
        """Its output; Wrong if it fails or does not end."""
        name = " ".join(map(str, cast("Sequence[object]", program.args)))[:200]
        limit = max(self.time_left, 0) + GRACE_SECONDS
        try:
            output = program.communicate(say, timeout=limit)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            program.kill()
            program.communicate()
            raise Wrong(f"{name}: does not end") from None
        if program.returncode:
            raise Wrong(f"{name}: status {program.returncode}\n{output[-TOLD_CHARACTERS:]}")
        return output

    def run(
        self,
        *words: str | Path,
        user: int | None = None,
        env: Mapping[str, str] | None = None,
        say: str | None = None,
        same_addresses: bool = False,
    ) -> str:
        """Run a program to its end, see start() and finish()."""
        stdin = subprocess.DEVNULL if say is None else subprocess.PIPE
        program = self.start(*words, user=user, env=env, stdin=stdin, same_addresses=same_addresses)
        return self.finish(program, None if say is None else say.encode())


def _nothing() -> None:
    pass


def _open_way(directory: Path) -> None:
    """Let other users reach a directory, wherever the host keeps it; the guest's view only."""
    for above in directory.parents:
        mode = above.stat().st_mode
        if not mode & 0o001:
            above.chmod(mode | 0o001)
