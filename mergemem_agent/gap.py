# SPDX-License-Identifier: MIT
"""What a census does not cover: processes and pages that were left out, and what was not seen."""

import enum
from dataclasses import dataclass


class Unread(enum.Enum):
    """Why a process, or pages of it, did not enter the census."""

    DENIED = "access denied"
    GONE = "ended meanwhile"
    KERNEL_THREAD = "kernel thread"
    NOT_DUMPABLE = "not dumpable, and no policy includes it"
    CHANGED = "pages that changed while they were read"
    FAILED = "pages that could not be read"
    SWAPPED = "pages on swap"
    REFUSED = "pages in mappings that are never merged"


class Limit(enum.Enum):
    """What the caller may not see: what that does to the figures, and what it takes to see it."""

    FRAME_NUMBERS = enum.auto()
    FRAME_FLAGS = enum.auto()
    KSM_FLAG = enum.auto()
    MAPPING_COUNTS = enum.auto()
    PROCESSES = enum.auto()

    @property
    def effect(self) -> str:
        """What it does to the figures."""
        return _EFFECTS[self]

    @property
    def needs(self) -> str:
        """What it takes to see more: capabilities, mostly."""
        return _NEEDS[self]


_EFFECTS = {
    Limit.FRAME_NUMBERS: (
        "frame numbers are hidden: pages are taken for shared since a fork if they have equal "
        "bytes at equal addresses"
    ),
    Limit.FRAME_FLAGS: (
        "/proc/kpageflags cannot be read or used: pages in huge pages "
        "and pages that KSM has merged count as ordinary ones"
    ),
    Limit.KSM_FLAG: (
        "this kernel's /proc/kpageflags calls every anonymous page one of KSM's: pages that KSM "
        "has merged count as ordinary ones"
    ),
    Limit.MAPPING_COUNTS: (
        "/proc/kpagecount cannot be read or used: a frame that processes outside of the "
        "selection map as well may count as freed"
    ),
    Limit.PROCESSES: "processes of other users, or that ptrace restrictions protect, were left out",
}
_NEEDS = {
    Limit.FRAME_NUMBERS: "CAP_SYS_ADMIN",
    Limit.FRAME_FLAGS: "CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH",
    Limit.KSM_FLAG: "a kernel without that error",
    Limit.MAPPING_COUNTS: "CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH",
    Limit.PROCESSES: "CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH",
}


@dataclass(frozen=True)
class Gap:
    """Something that did not enter the census. `pages` is 0 for a whole process."""

    pid: int
    reason: Unread
    pages: int = 0
    detail: str = ""
