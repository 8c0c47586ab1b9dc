# SPDX-License-Identifier: MIT
"""A host that keeps core mm busy: all processors, huge pages made and split, swap, compaction.

The rig's guests have processors that are not in use, since most tests are faster with two.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROCESSORS = Path("/sys/devices/system/cpu")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
SWAP_BYTES = 64 << 20


@contextmanager
def settings(values: dict[Path, str]) -> Iterator[None]:
    """Files of sysfs or procfs with other values for a while."""
    before = {path: path.read_text() for path in values}
    try:
        for path, value in values.items():
            path.write_text(value)
        yield
    finally:
        for path, text in before.items():
            # Of a choice, the one in brackets.
            chosen = re.search(r"\[(\w+)\]", text)
            path.write_text(chosen[1] if chosen else text.strip())


@contextmanager
def all_processors() -> Iterator[int]:
    """All processors that the machine has; their number."""
    with settings(dict.fromkeys(PROCESSORS.glob("cpu[0-9]*/online"), "1")):
        # The first one may not be switched off, and so has no such file.
        yield len(list(PROCESSORS.glob("cpu[0-9]*")))


@contextmanager
def huge_pages() -> Iterator[None]:
    """Everything that can be huge becomes huge, and at once."""
    daemon = HUGE_PAGES / "khugepaged"
    values = {
        HUGE_PAGES / "enabled": "always",
        HUGE_PAGES / "defrag": "always",
        daemon / "scan_sleep_millisecs": "0",
        daemon / "alloc_sleep_millisecs": "0",
        daemon / "pages_to_scan": "4096",
    }
    with settings(values):
        yield


@contextmanager
def swap_device(directory: Path, size_bytes: int = SWAP_BYTES) -> Iterator[None]:
    """A loop device over a file: other than zram, it goes through the swap cache."""
    file = directory / "swap"
    with file.open("wb") as empty:
        # In memory, as /tmp is: what it takes is taken now, and not with the first page out.
        os.posix_fallocate(empty.fileno(), 0, size_bytes)
    subprocess.run(["modprobe", "loop"], check=True)
    words = ["losetup", "--find", "--show", str(file)]
    device = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run(["mkswap", device], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["swapon", device], check=True)
    try:
        yield
    finally:
        subprocess.run(["swapoff", device], check=True)
        subprocess.run(["losetup", "--detach", device], check=True)
        file.unlink()


def events() -> dict[str, int]:
    """What the kernel's memory management has counted since boot."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    return {name: int(number) for name, number in (line.split() for line in lines)}
