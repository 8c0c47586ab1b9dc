# SPDX-License-Identifier: MIT
"""The numbers and structures of kmod/uapi/mergemem.h, as the tests know them.

The agent has its own; a test compares these with the header, and one of the agent compares those.
"""

from __future__ import annotations

import re
import struct
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

HEADER = Path(__file__).parents[2] / "kmod" / "uapi" / "mergemem.h"


class Command(IntEnum):
    """enum mergemem_command."""

    INFO = 1
    CHECKSUM = 2
    MERGE = 3
    UNMERGE = 4


class Attribute(IntEnum):
    """enum mergemem_attribute."""

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


class State(IntEnum):
    """enum mergemem_state."""

    ABSENT = 0
    SWAPPED = 1
    ZERO_PAGE = 2
    ANON = 3
    ZERO = 4
    MERGED = 5
    HUGE = 6
    PINNED = 7
    REFUSED = 8


class Result(IntEnum):
    """enum mergemem_result."""

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


FEATURE_CROSS_UID, FEATURE_SPLIT = 1, 2
MERGE_ANY_NODE = 1
GROUP_ZERO = 0xFFFFFFFF
PROCESS_UNDUMPABLE = 1
MAX_PROCESSES, MAX_CANDIDATES = 1024, 4000
MAX_UNMERGE_PAGES = 16384
DEPTH_SAMPLE_BYTES, DEPTH_FULL_BYTES = 256, 4096
MAX_FULL_PAGES = 65536

PROCESS = struct.Struct("=IIQ")
CANDIDATE = struct.Struct("=QII")
RECORD = np.dtype([("checksum", "u8"), ("map_count", "u4"), ("state", "u2"), ("order", "u2")])
Records = npt.NDArray[np.void]


def header_enum(name: str) -> dict[str, int]:
    """An enum of the header: its names without the prefix, and their numbers."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    found = re.search(rf"enum mergemem_{name} {{(.*?)}};", text, re.DOTALL)
    assert found, f"no enum mergemem_{name} in {HEADER}"
    names = [line.strip().split(" ")[0] for line in found[1].split(",") if line.strip()]
    return {name.removeprefix("MERGEMEM_"): number for number, name in enumerate(names)}


def struct_text(name: str) -> str:
    """The members of a struct of the header."""
    found = re.search(rf"struct mergemem_{name} {{(.*?)}};", HEADER.read_text(), re.DOTALL)
    assert found, f"no struct mergemem_{name} in {HEADER}"
    return found[1]
