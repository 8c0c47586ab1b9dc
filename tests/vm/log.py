# SPDX-License-Identifier: MIT
"""What the guest's kernel log says went wrong, whatever the command said."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# A line that matches one of these fails the run.
BAD = re.compile(
    "|".join(
        (
            r"\bBUG\b",  # BUG(), KASAN, lockdep, atomic sleeps, bad page state, soft lockups
            r"\bWARNING\b",  # WARN(), lockdep
            r"\bOops\b|kernel panic|Kernel panic",
            r"general protection fault|[Uu]nable to handle kernel|double fault|stack guard page",
            r"[Cc]all [Tt]race",  # also what out-of-memory and allocation failures print
            r"possible .* (detected|deadlock)|inconsistent lock state|suspicious RCU usage",
            r"held lock freed|lock held when returning|bad unlock balance|lock imbalance",
            r"Bad page|Bad rss-counter|Bad swap|Bad pagetable|bad pmd|bad pud|bad p4d|bad pgd",
            r"non-zero pgtables_bytes|nonzero mapcount|page dumped because",
            r"list_(add|del) corruption|refcount_t|page_table_check",
            r"KASAN|KCSAN|KFENCE|KMSAN|UBSAN|kmemleak: \d+ new|memory leak",
            r"soft lockup|hard LOCKUP|rcu.*(detected|self-detected) .*stall|rcu.*stalls? on",
            r"blocked for more than|hung_task|Out of memory|page allocation failure",
            r"scheduling while atomic|sleeping function called|invalid opcode|CFI failure",
            r"(?i:unknown symbol)",
            r"int3: 0000|[Mm]issing ENDBR|Slab .*(corrupt|overwritten)|Object .*overwritten",
        )
    )
)

# Lines that look bad and say nothing about the module; each with the reason.
HARMLESS = (
    # A user program's own fault, delivered to it as a signal: "traps: python3[12] general
    # protection fault ip:… sp:… error:0 in libc.so.6".
    re.compile(r"traps: .* general protection fault ip:"),
    # How the processor of the moment is affected by hardware bugs, not what our code did.
    re.compile(r"(Spectre V2|RETBleed|MDS|TAA|MMIO Stale Data|SRSO|TSA) *: WARNING"),
    # Somebody asked for a block of memory to go offline, and it can not: a notice, with errno.
    re.compile(r"page dumped because: (unmovable page|migration failure)"),
    # The debug kernel introduces itself.
    re.compile(r"kmemleak: Kernel memory leak detector initialized"),
    # Emulation is slower than the calibration expects.
    re.compile(r"clocksource: .*(unstable|[Ww]atchdog)"),
)

# "[    1.234567] " before each line, with the thread in brackets when the kernel is set to.
STAMP = re.compile(r"^(?:<\d+>)?\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? ?")


def findings(text: str, allow: Iterable[str] = ()) -> tuple[str, ...]:
    """The bad lines of a kernel log, without repetitions, in order.

    `allow` are further patterns of lines that this run provokes on purpose.
    """
    harmless = [*HARMLESS, *(re.compile(pattern) for pattern in allow)]
    found: dict[str, None] = {}
    for line in text.splitlines():
        message = STAMP.sub("", line).strip()
        if BAD.search(message) and not any(pattern.search(message) for pattern in harmless):
            found.setdefault(message)
    return tuple(found)


def tail(text: str, lines: int = 40) -> str:
    return "\n".join(text.splitlines()[-lines:])


def report(found: Sequence[str]) -> str:
    return "\n".join(f"kernel log: {line}" for line in found)
