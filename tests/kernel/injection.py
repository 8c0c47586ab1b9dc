# SPDX-License-Identifier: MIT
"""Making an allocation fail: the nth one of this thread (Documentation/fault-injection).

Which one that was shows in a trace: allocators ask whether they shall fail, and the stack of each
answer that they shall, and of each question if wanted, is kept. A call site is named as the kernel
names return addresses: function and offset. The module's call sites are read from its own file.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

PAGE_BYTES = 4096
MCL_CURRENT = 1
FAIL_NTH = Path("/proc/thread-self/fail-nth")
KNOBS = Path("/sys/kernel/debug")
TRACING = Path("/sys/kernel/tracing")
INSTANCE = TRACING / "instances" / "mergemem"
# Slabs, pages. (A failing copy from or to user space is no allocation, and is not traced.)
ASKED = ("should_failslab", "should_fail_alloc_page")
# " => mergemem_merge+0x12a/0x9f0 [mergemem] <ffffffffa000512a>"; of a module that is gone by the
# time of reading, only " => 0xffffffffa000512a <ffffffffa000512a>".
FRAME = re.compile(r" => (\w[\w.]*)\+0x([0-9a-f]+)/0x[0-9a-f]+ \[mergemem\] <([0-9a-f]+)>")
NAMELESS_FRAME = re.compile(r" => 0x[0-9a-f]+ <([0-9a-f]+)>")
EVENT = re.compile(r" (asked_\w+|failed_\w+): ")
FAILED = "failed != 0"
FUNCTION_SYMBOL = re.compile(
    r"^ *\d+: ([0-9a-f]+) +(\d+|0x[0-9a-f]+) FUNC +\w+ +\w+ +(\d+) (\S+)", re.MULTILINE
)
CALL = re.compile(r"^([0-9a-f]+) +[0-9a-f]+ R_X86_64_PLT32 +[0-9a-f]+ (\S+) - 4", re.MULTILINE)


class Site(NamedTuple):
    """A call in the module: where it returns to."""

    function: str
    offset: int

    def __str__(self) -> str:
        return f"{self.function}+{self.offset:#x}"


class Frame(NamedTuple):
    """The module's innermost frame in a stack; without a site if the module is gone."""

    site: Site | None
    # The module is loaded to whole pages: this is the same at each load.
    place_in_page: int


def possible() -> bool:
    """Whether this kernel can make allocations fail."""
    return FAIL_NTH.exists()


def call_sites(module: str, target: re.Pattern[str]) -> dict[Site, str]:
    """All calls in a module's code to functions of some names, and what each calls."""
    symbols = _readelf("-sW", module)
    functions = [
        (int(section), int(start, 16), int(size, 0), name)
        for start, size, section, name in FUNCTION_SYMBOL.findall(symbols)
    ]
    numbers = {
        name: int(number)
        for number, name in re.findall(r"\[ *(\d+)\] (\S+)", _readelf("-SW", module))
    }
    found = {}
    for part in _readelf("-rW", module).split("Relocation section '")[1:]:
        section = numbers[part.partition("'")[0].removeprefix(".rela")]
        for offset, callee in CALL.findall(part):
            if not target.search(callee):
                continue
            # The four bytes at the end of the call instruction are what is relocated.
            back_to = int(offset, 16) + 4
            for number, start, size, name in functions:
                if number == section and start < back_to <= start + size:
                    found[Site(name, back_to - start)] = callee
    return found


def _readelf(flag: str, module: str) -> str:
    done = subprocess.run(["readelf", flag, module], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


@contextmanager
def resident() -> Iterator[None]:
    """No page of a file needs to be read.

    Else the failure may be that of a read, which some file systems do not get over (9p: its files
    cannot be opened any more).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    assert not libc.mlockall(MCL_CURRENT), os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        libc.munlockall()


@contextmanager
def settings() -> Iterator[None]:
    """Any allocation may fail, without a word in the log; and each question is traced."""
    for name, knob, value in (
        ("failslab", "ignore-gfp-wait", "N"),
        ("failslab", "verbose", "0"),
        ("fail_page_alloc", "ignore-gfp-wait", "N"),
        ("fail_page_alloc", "ignore-gfp-highmem", "N"),
        ("fail_page_alloc", "min-order", "0"),
        ("fail_page_alloc", "verbose", "0"),
        ("fail_usercopy", "verbose", "0"),
    ):
        if (KNOBS / name).exists():
            (KNOBS / name / knob).write_text(value)
    probes = [f"p:mergemem/asked_{name} {name}" for name in ASKED]
    probes += [f"r:mergemem/failed_{name} {name} failed=$retval:u8" for name in ASKED]
    (TRACING / "kprobe_events").write_text("\n".join(probes) + "\n")
    INSTANCE.mkdir()
    events = INSTANCE / "events" / "mergemem"
    mine = f"common_pid == {threading.get_native_id()}"
    try:
        for option in ("sym-offset", "sym-addr"):
            (INSTANCE / "options" / option).write_text("1")
        for name in ASKED:
            (events / f"asked_{name}" / "filter").write_text(mine)
            (events / f"failed_{name}" / "filter").write_text(FAILED)
            (events / f"failed_{name}" / "trigger").write_text(f"stacktrace if {FAILED}")
            (events / f"failed_{name}" / "enable").write_text("1")
        yield
    finally:
        (events / "enable").write_text("0")
        INSTANCE.rmdir()
        (TRACING / "kprobe_events").write_text("")


class Failure:
    """Lets the nth allocation fail within a `with`; then says whether it did, and whose it was.

    With `within`, the name of a system call, also whose all others were that it made; printing
    their stacks takes longer than anything else here.
    """

    def __init__(self, nth: int, within: str = "") -> None:
        self.nth = nth
        self.within = within
        self.happened = False
        # How many were not reached.
        self.left = nth
        # Where the module was at each allocation, None for not in it, in order.
        self.asked: list[Frame | None] = []
        # Where it was at the allocation that failed.
        self.frame: Frame | None = None

    def __enter__(self) -> Failure:
        (INSTANCE / "trace").write_text("")
        self._trace_questions(True)
        self._file = os.open(FAIL_NTH, os.O_RDWR)
        os.pwrite(self._file, str(self.nth).encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.left = int(os.pread(self._file, 16, 0))
            self.happened = self.left == 0
        except OSError as error:
            # Handing the number out could fail too: then that was the nth.
            if error.errno != errno.EFAULT:
                raise
        self._stop()
        os.close(self._file)
        self._trace_questions(False)
        for event, stack in _stacks((INSTANCE / "trace").read_text()):
            if event.startswith("failed"):
                self.frame = _named(stack) or _nameless(stack)
            elif self.within in stack:
                self.asked.append(_named(stack))

    @property
    def site(self) -> Site | None:
        """The module's call that the failed allocation was part of."""
        return self.frame.site if self.frame else None

    def _trace_questions(self, on: bool) -> None:
        if self.within:
            for name in ASKED:
                event = INSTANCE / "events" / "mergemem" / f"asked_{name}"
                mine = f"stacktrace if common_pid == {threading.get_native_id()}"
                (event / "trigger").write_text(mine if on else f"!{mine}")
                (event / "enable").write_text(str(int(on)))

    def _stop(self) -> None:
        """No failure after this one. Taking the number in is something that can fail, too."""
        try:
            os.pwrite(self._file, b"0", 0)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            os.pwrite(self._file, b"0", 0)


def _stacks(trace: str) -> Iterator[tuple[str, str]]:
    """Each event, and the stack that follows it."""
    event = ""
    for part in trace.split("<stack trace>"):
        if event:
            yield event, part
        names = EVENT.findall(part)
        event = names[-1] if names else ""


def _named(stack: str) -> Frame | None:
    found = FRAME.search(stack)
    if not found:
        return None
    function, offset, address = found.groups()
    return Frame(Site(function, int(offset, 16)), int(address, 16) % PAGE_BYTES)


def _nameless(stack: str) -> Frame | None:
    found = NAMELESS_FRAME.search(stack)
    return Frame(None, int(found[1], 16) % PAGE_BYTES) if found else None
