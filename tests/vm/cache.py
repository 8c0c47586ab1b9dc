# SPDX-License-Identifier: MIT
"""The cache of slow things: whole or absent, never half made, safe to share between runs."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
BUILD = CHECKOUT / "build"


def cache_dir() -> Path:
    """`$MERGEMEM_CACHE`, else the user's cache directory."""
    chosen = os.environ.get("MERGEMEM_CACHE")
    if chosen:
        return Path(chosen).resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).resolve() / "mergemem"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock named after `path`; the kernel drops it if this process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{path.name}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, made by `make(directory)` if it is not there yet.

    It is made under a temporary name and renamed, so an interrupted run leaves nothing that
    looks finished, and under a lock, so two runs don't make it twice.
    """
    if target.exists():
        return target
    with locked(target):
        if not target.exists():
            # What an earlier, interrupted run left: the lock says nobody is using it.
            for leftover in target.parent.glob(f".{target.name}.making-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            making = Path(tempfile.mkdtemp(prefix=f".{target.name}.making-", dir=target.parent))
            making.chmod(0o755)
            make(making)
            making.rename(target)
    return target


def content_key(parts: Iterable[bytes | str | Path]) -> str:
    """A short name for a set of contents; a path counts with its bytes."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part
        data = data.encode() if isinstance(data, str) else data
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]
