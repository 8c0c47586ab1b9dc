# SPDX-License-Identifier: MIT
"""The kernel log scanner: what fails a run, and what must not."""

from __future__ import annotations

import pytest

from tests.vm import log


@pytest.mark.parametrize(
    "line",
    [
        "WARNING: CPU: 0 PID: 136 at /src/merge.c:11 merge_init+0x1a/0x1000 [mergemem]",
        "WARNING: possible circular locking dependency detected",
        "WARNING: possible recursive locking detected",
        "WARNING: suspicious RCU usage",
        "WARNING: inconsistent lock state",
        "BUG: unable to handle page fault for address: ffff888100000000",
        "BUG: kernel NULL pointer dereference, address: 0000000000000008",
        "BUG: Bad page state in process python3  pfn:12345",
        "BUG: Bad page map in process python3  pte:8000000012345025 pmd:00000067",
        "BUG: Bad rss-counter state mm:00000000abcdef type:MM_ANONPAGES val:1",
        "BUG: non-zero pgtables_bytes on freeing mm: 4096",
        "BUG: KASAN: slab-use-after-free in checksum_range+0x10/0x20 [mergemem]",
        "BUG: KFENCE: out-of-bounds read in merge",
        "BUG: sleeping function called from invalid context at mm/page_alloc.c:1",
        "BUG: scheduling while atomic: python3/123/0x00000002",
        "watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [python3:123]",
        "Oops: 0000 [#1] PREEMPT SMP NOPTI",
        "Oops: general protection fault, probably for non-canonical address 0xdead000000000100",
        "general protection fault, probably for non-canonical address 0xdead000000000100: 0000",
        "list_add corruption. prev->next should be next (ffff), but was 0000.",
        "list_del corruption, ffff->next is LIST_POISON1 (dead000000000100)",
        "refcount_t: underflow; use-after-free.",
        "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
        "rcu: INFO: rcu_sched self-detected stall on CPU",
        "UBSAN: array-index-out-of-bounds in merge.c:1:2",
        "kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
        "page dumped because: VM_BUG_ON_PAGE(page_mapcount(page) < 0)",
        "INFO: task python3:123 blocked for more than 120 seconds.",
        "python3 invoked oom-killer: Out of memory: Killed process 123 (python3)",
        "mergemem: Unknown symbol folio_lock (err -2)",
        "kernel BUG at mm/rmap.c:1234!",
        "Kernel panic - not syncing: Fatal exception",
        "Call Trace:",
        "bad pmd ffff888100000000(0000000000000001)",
        "traps: Missing ENDBR: merge_pages+0x0/0x10 [mergemem]",
    ],
)
def test_bad(line: str) -> None:
    assert log.findings(f"[   12.345678] {line}") == (line,)


@pytest.mark.parametrize(
    "line",
    [
        "mergemem: loading out-of-tree module taints kernel.",
        "mergemem: module verification failed: signature and/or required key missing - tainting",
        "traps: python3[99] general protection fault ip:7f00 sp:7ffc error:0 in libc.so.6[7f00]",
        "python3[99]: segfault at 8 ip 00007f0 sp 00007ff error 4 in libc.so.6[7f00+1000]",
        "tsc: Unable to calibrate against PIT",
        "Freeing unused kernel image (rodata/data gap) memory: 1108K",
        "debugfs: mounted",
        "mtrr: your CPUs had inconsistent variable MTRR settings",
        "process '/usr/bin/python3' started with executable stack",
        "[    1.0] kmemleak: Kernel memory leak detector initialized (mem pool available: 62803)",
    ],
)
def test_harmless(line: str) -> None:
    assert log.findings(f"[   12.345678] {line}") == ()


def test_stamps_with_the_thread_or_the_level_are_taken_off() -> None:
    text = "[  1.000000][    T1] BUG: a\n<4>[ 2.000000] BUG: a\n[    3.000000] BUG: b"
    assert log.findings(text) == ("BUG: a", "BUG: b")


def test_lines_provoked_on_purpose_are_allowed_by_pattern_only() -> None:
    text = "[ 1.0] Out of memory: Killed process 1 (x)\n[ 1.1] BUG: other"
    assert log.findings(text, [r"Out of memory: .*\(x\)"]) == ("BUG: other",)


def test_tail() -> None:
    assert log.tail("a\nb\nc", 2) == "b\nc"
