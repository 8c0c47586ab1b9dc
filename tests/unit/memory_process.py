# SPDX-License-Identifier: MIT
"""A process with memory of known content, and of no other that a census would count.

    memory_process.py CONTENTS [--forks N] [--rewrite POSITION=CONTENT]... [--reserve-pages N] ...

CONTENTS are numbers, one a page: equal numbers mean equal bytes, 0 zeros that were written, and
"-" a page that is only read, so that the kernel's page of zeros is mapped there, and "x" one that
is not touched. All other private memory, that of the interpreter, is marked MADV_DONTDUMP, which
mergemem never merges. Prints the pids of the process and of its forks, then the address, and ends
when stdin does.
Needs only the standard library, so that any user and any Python can run it.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import sys

PAGE_BYTES = 4096
HUGE_BYTES = 2 << 20
PR_SET_DUMPABLE = 4
MAP_NORESERVE = 0x4000  # in Python's mmap not before 3.12
PR_SET_PTRACER = 0x59616D61

libc = ctypes.CDLL(None, use_errno=True)


def content(number: int) -> bytes:
    """Return the bytes that a number stands for."""
    return bytes(PAGE_BYTES) if number == 0 else random.Random(number).randbytes(PAGE_BYTES)


def madvise(start: int, end: int, advice: int) -> int:
    """Advise the kernel on memory of this process; return what madvise(2) does."""
    result = libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
    return int(result)


def hide_the_rest(start: int, end: int) -> None:
    """Mark all other private anonymous memory of this process."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        lines = maps.readlines()
    for line in lines:
        fields = line.split()
        low, high = (int(part, 16) for part in fields[0].split("-"))
        private = fields[1][3] == "p" and fields[4] == "0"
        if private and (high <= start or low >= end):
            madvise(low, high, mmap.MADV_DONTDUMP)  # fails for the kernel's own, [vdso] and such


def let_anybody_look() -> None:
    """Lift the restriction of the Yama security module to a tracer's own descendants."""
    libc.prctl(PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)


def main() -> None:
    """Fill the memory, fork, report, and wait."""
    parser = argparse.ArgumentParser()
    parser.add_argument("contents", type=lambda text: text.split(",") if text else [])
    parser.add_argument("--forks", type=int, default=0)
    parser.add_argument("--rewrite", action="append", default=[])
    parser.add_argument("--reserve-pages", type=int, default=0, help="untouched, before the rest")
    parser.add_argument("--huge", action="store_true")
    parser.add_argument("--undumpable", action="store_true")
    options = parser.parse_args()

    pages = options.reserve_pages + len(options.contents)
    slack = HUGE_BYTES if options.huge else 0
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, pages * PAGE_BYTES + slack, flags=private)
    mapped = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    start = -(-mapped // HUGE_BYTES) * HUGE_BYTES if options.huge else mapped
    madvise(
        mapped, mapped + len(memory), mmap.MADV_HUGEPAGE if options.huge else mmap.MADV_NOHUGEPAGE
    )
    first = start - mapped + options.reserve_pages * PAGE_BYTES

    def write(position: int, number: str) -> None:
        offset = first + position * PAGE_BYTES
        if number == "-":
            assert memory[offset] == 0
        elif number != "x":
            memory[offset : offset + PAGE_BYTES] = content(int(number))

    for position, number in enumerate(options.contents):
        write(position, number)
    hide_the_rest(mapped, mapped + len(memory))
    if options.undumpable:
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    let_anybody_look()
    pids = [os.getpid()]
    for _ in range(options.forks):
        ready, written = os.pipe()
        pid = os.fork()
        if pid == 0:
            for rewrite in options.rewrite:
                position, _, number = rewrite.partition("=")
                write(int(position), number)
            hide_the_rest(mapped, mapped + len(memory))
            let_anybody_look()
            os.write(written, b".")
            sys.stdin.buffer.read()
            os._exit(0)
        os.read(ready, 1)
        pids.append(pid)
    print(*pids, hex(start), flush=True)
    sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
