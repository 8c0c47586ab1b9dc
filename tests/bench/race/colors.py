# SPDX-License-Identifier: MIT
"""Who has which color in all pictures, and which line."""

from __future__ import annotations

from tests.bench.race.cases import (
    ADVISOR,
    DEFAULTS,
    FLAT_OUT,
    KSMD_HELD,
    MERGEMEM,
    MERGEMEM_HELD,
    NOBODY,
)

OURS, THEIRS, INK, TARGET = "#2a6f97", "#c1121f", "#333333", "#2b9348"
STYLES = {
    MERGEMEM: (OURS, "-", 2.8),
    MERGEMEM_HELD: (OURS, "--", 1.6),
    FLAT_OUT: (THEIRS, "-", 2.2),
    KSMD_HELD: (THEIRS, "--", 1.6),
    DEFAULTS: ("#e09f3e", "-", 1.6),
    ADVISOR: ("#9d8189", "-", 1.6),
    NOBODY: (INK, "-", 1.6),
}
