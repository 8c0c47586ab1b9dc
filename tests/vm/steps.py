# SPDX-License-Identifier: MIT
"""Named and timed steps, so that whoever waits sees what for."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


class StepFailed(Exception):
    """A command of a step failed; its output has been shown."""


def say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def step(name: str) -> Iterator[None]:
    say(f"==> {name}")
    started = time.monotonic()
    try:
        yield
    except BaseException:
        say(f"<== {name}: FAILED after {time.monotonic() - started:.1f} s")
        raise
    say(f"<== {name}: {time.monotonic() - started:.1f} s")


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    quiet: bool = True,
) -> str:
    """Run a command of a step; a quiet one is heard only when it fails."""
    pipe = subprocess.PIPE if quiet else None
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
    )
    if done.returncode:
        sys.stderr.write((done.stdout or "") + (done.stderr or ""))
        raise StepFailed(f"{' '.join(words)}: exit status {done.returncode}")
    return done.stdout or ""
