# SPDX-License-Identifier: MIT
"""stress-ng with --verify: it fills, moves, maps, forks, and checks what it reads."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.judges.judge import Judge
from tests.judges.place import UNPRIVILEGED, NotRun, Place, Wrong

# stress-ng's own: it lacked something, or cannot do this here.
FAILED, NO_RESOURCE, NOT_IMPLEMENTED = 2, 3, 4
FAILURE = re.compile(r"stress-ng: (fail|error):|SIGSEGV|SIGBUS|SIGILL|signal \d+ ")
SKIPPED = re.compile(r"\b(will be skipped|skipping|not implemented)\b")
BOGO_OPERATIONS = re.compile(r"metrc: \[\d+\] \S+ +(\d+) +\d+\.\d+ +\d+\.\d+ ")
TOLD_CHARACTERS = 1500


@dataclass(frozen=True)
class Stress:
    """Stressors that run side by side, for the whole time."""

    options: str
    user: int | None = None

    def __call__(self, place: Place) -> None:
        stress(place, self.options, place.seconds, user=self.user)


@dataclass(frozen=True)
class Turns:
    """Invocations that share the time, one after the other."""

    turns: tuple[str, ...]

    def __call__(self, place: Place) -> None:
        for options in self.turns:
            stress(place, options, place.seconds / len(self.turns))


@dataclass(frozen=True)
class Again:
    """A stressor that ends early because of complaints of its own, which mean nothing; repeated."""

    options: str
    own_complaints: str

    def __call__(self, place: Place) -> None:
        first = True
        while first or place.time_left > 0:
            stress(place, self.options, max(1, place.time_left), self.own_complaints)
            first = False


def stress(
    place: Place,
    options: str,
    seconds: float,
    own_complaints: str = "(?!)",
    user: int | None = None,
) -> None:
    """Run stress-ng once, and raise what its report says."""
    words = ["stress-ng", *options.split(), "--verify", "--timeout", str(max(1, round(seconds)))]
    words += ["--metrics-brief", "--temp-path", str(place.directory)]
    # Its status has several meanings, and finish() knows but one.
    output = place.run("sh", "-c", '"$@"; echo "status $?"', "sh", *words, user=user)
    status = int(output.rpartition("status ")[2])
    complaints = [line for line in output.splitlines() if FAILURE.search(line)]
    failures = [line for line in complaints if not re.search(own_complaints, line)]
    told = f"stress-ng {options}: status {status}\n{output[-TOLD_CHARACTERS:]}"
    good = (0, NO_RESOURCE, NOT_IMPLEMENTED, FAILED if complaints else 0)
    if failures or status not in good:
        raise Wrong("\n".join([*failures[:10], told]), max(1, len(failures)))
    done = [int(count) for count in BOGO_OPERATIONS.findall(output)]
    unable = status in (NO_RESOURCE, NOT_IMPLEMENTED) or SKIPPED.search(output)
    if unable or not any(done):
        raise NotRun(told)


METHODS = ("galpat-0", "incdec", "rand-set", "ror", "swap", "walk-0d", "zero-one")
# Small enough for an emulated processor to be done with some.
SORTS = "--qsort 1 --qsort-size 4096 --heapsort 1 --heapsort-size 4096 --tree 1 --tree-size 1000"

JUDGES = (
    Judge("stress-vm", "patterns in memory, all methods", Stress("--vm 2 --vm-bytes 16m"), 100, 20),
    Judge(
        "stress-vm-methods",
        f"patterns: {', '.join(METHODS)}",
        Turns(tuple(f"--vm 2 --vm-bytes 8m --vm-method {method}" for method in METHODS)),
        100,
        28,
    ),
    Judge("stress-mmapfork", "memory of many forked children", Stress("--mmapfork 1"), 100),
    Judge(
        "stress-mremap", "moved and resized mappings", Stress("--mremap 2 --mremap-bytes 4m"), 100
    ),
    Judge(
        "stress-fork", "forks that work on memory", Stress("--fork 1 --fork-vm --vforkmany 1"), 20
    ),
    Judge("stress-tlb-shootdown", "mprotect on many processors", Stress("--tlb-shootdown 2"), 10),
    # Root's advice is that frames are broken, which kills by itself.
    Judge("stress-madvise", "all kinds of advice", Stress("--madvise 2", UNPRIVILEGED), 10),
    Judge("stress-vm-splice", "pages given to pipes", Stress("--vm-splice 1 --splice 1"), 10),
    Judge("stress-aio", "asynchronous I/O into memory", Stress("--aio 2"), 10),
    Judge(
        "stress-io-uring",
        "io_uring",
        # It asks for the status of a file that it has deleted: refused, merged or not.
        Again("--io-uring 2", r"IORING_OP_STATX|exit status=2 \(stressor failed\)"),
        10,
    ),
    Judge(
        "stress-userfaultfd",
        "pages that a handler fills in",
        Stress("--userfaultfd 2 --userfaultfd-bytes 4m"),
        10,
    ),
    Judge(
        "stress-memthrash",
        "threads that thrash memory",
        Stress("--memthrash 1 --memthrash-method random"),
        10,
    ),
    Judge("stress-malloc", "malloc, verified", Stress("--malloc 2 --malloc-bytes 16m"), 10),
    Judge("stress-mmap", "mapped, written, read, unmapped", Stress("--mmap 2 --mmap-bytes 8m"), 10),
    Judge(
        "stress-maps",
        "munmap, mprotect, mlock, remapped files, addresses",
        Stress("--munmap 1 --mprotect 1 --mlock 1 --remap 1 --vm-addr 1"),
        10,
    ),
    Judge(
        "stress-vm-rw", "reads of other processes' memory", Stress("--vm-rw 2 --vm-rw-bytes 4m"), 10
    ),
    Judge(
        "stress-heap",
        "brk, stacks, page-in",
        Stress("--brk 1 --stack 1 --stackmmap 1 --page-in"),
        10,
    ),
    Judge(
        "stress-pageswap",
        "pages forced out and in",
        Stress("--pageswap 2 --memrate 1 --memrate-bytes 8m"),
        10,
    ),
    Judge("stress-sorts", "sorted data, checked", Stress(SORTS), 10),
)
