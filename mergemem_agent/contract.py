# SPDX-License-Identifier: MIT
"""The contract with mergemem.ko: kmod/uapi/mergemem.h, in Python.

The header is the source and documents every value; this file repeats names and numbers so
that the agent needs no compiler. tests/unit/test_contract.py compiles the header and
compares each enum value, each structure's size and each field's offset with what stands here.

Structures are numpy dtypes: what crosses the socket are packed arrays, and numpy reads and
writes them where they lie.
"""

from __future__ import annotations

import enum
from typing import Final

import numpy as np

FAMILY_NAME: Final = "mergemem"
CONTRACT_VERSION: Final = 3

# Limits of one request. INFO reports those of the loaded module, and those count.
MAX_PROCESSES: Final = 1024
MAX_CANDIDATES: Final = 4000
MAX_UNMERGE_PAGES: Final = 16384
MAX_FULL_PAGES: Final = 65536
DEPTH_STEP_BYTES: Final = 64
DEPTH_SAMPLE_BYTES: Final = 256
DEPTH_FULL_BYTES: Final = 4096

PAGE_BYTES: Final = 4096

# In place of a candidate's group: the page is believed to be filled with zeros.
GROUP_ZERO: Final = 0xFFFF_FFFF


class Command(enum.IntEnum):
    """enum mergemem_command: what a client can ask for."""

    UNSPEC = 0
    INFO = 1
    CHECKSUM = 2
    MERGE = 3
    UNMERGE = 4


class Attribute(enum.IntEnum):
    """enum mergemem_attribute: what messages are made of."""

    UNSPEC = 0
    PAD = 1
    CONTRACT_VERSION = 2
    MODULE_VERSION = 3
    FEATURES = 4
    LIMITS = 5
    COUNTERS = 6
    TOTALS = 7
    PROCESSES = 8
    ADDRESS = 9
    PAGES = 10
    DEPTH = 11
    RECORDS = 12
    REFUSED = 13
    CANDIDATES = 14
    RESULTS = 15
    UNMERGED = 16
    NEXT = 17
    FLAGS = 18
    SPLIT_PERCENT = 19
    COUNT_ONLY = 20
    FULL_PAGES = 21


class Feature(enum.IntFlag):
    """enum mergemem_feature: what this load of the module does."""

    CROSS_UID = 1 << 0
    SPLIT = 1 << 1


class MergeFlag(enum.IntFlag):
    """enum mergemem_merge_flag: how a MERGE request wants its pages merged."""

    ANY_NODE = 1 << 0


class ProcessFlag(enum.IntFlag):
    """enum mergemem_process_flag: permissions given along with a process."""

    UNDUMPABLE = 1 << 0


class State(enum.IntEnum):
    """enum mergemem_state: what CHECKSUM found in the place of a page."""

    ABSENT = 0
    SWAPPED = 1
    ZERO_PAGE = 2
    ANON = 3
    ZERO = 4
    MERGED = 5
    HUGE = 6
    PINNED = 7
    REFUSED = 8


class Result(enum.IntEnum):
    """enum mergemem_result: what became of one candidate."""

    SUCCESS = 0
    NOTASK1 = 1
    NOTASK2 = 2
    NOPAGE1 = 3
    NOPAGE2 = 4
    ALREADYSH = 5
    MOREMAP = 6
    NOTEQUAL = 7
    BUSY = 8
    PINNED = 9
    REFUSED = 10
    DOMAIN = 11
    NOMEM = 12
    HUGE = 13
    ALONE = 14
    ZEROED = 15
    NODE = 16


# struct mergemem_process
PROCESS: Final = np.dtype([("pid", np.uint32), ("flags", np.uint32), ("start_time", np.uint64)])

# struct mergemem_candidate
CANDIDATE: Final = np.dtype([("address", np.uint64), ("process", np.uint32), ("group", np.uint32)])

# struct mergemem_record
RECORD: Final = np.dtype(
    [
        ("checksum", np.uint64),
        ("map_count", np.uint32),
        ("state", np.uint16),
        ("order", np.uint16),
    ]
)

# struct mergemem_limits
LIMITS: Final = np.dtype(
    [
        ("max_processes", np.uint32),
        ("max_candidates", np.uint32),
        ("max_unmerge_pages", np.uint32),
        ("max_mappings", np.uint32),
        ("max_shared_bytes", np.uint64),
    ]
)

# struct mergemem_counters
COUNTERS: Final = np.dtype(
    [
        ("checksummed_pages", np.uint64),
        ("sampled_pages", np.uint64),
        ("merge_requests", np.uint64),
        ("unmerged_pages", np.uint64),
        ("tlb_flushes", np.uint64),
        ("lru_drains", np.uint64),
        ("results", np.uint64, (32,)),
        ("split_folios", np.uint64),
        ("split_failures", np.uint64),
    ]
)

# struct mergemem_totals
TOTALS: Final = np.dtype([("shared_pages", np.uint64), ("shared_mappings", np.uint64)])

# enum mergemem_result for each candidate
RESULT: Final = np.dtype(np.uint8)
