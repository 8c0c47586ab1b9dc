# SPDX-License-Identifier: MIT
"""Arrays of the size that a look works with cost no page faults once the heap keeps them."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOOKS = """
import resource
import numpy as np
from mergemem_agent import heap

if {kept}:
    heap.keep_arrays()

def look():
    return [np.ones(1 << 15, dtype=np.uint64) for _ in range(8)]  # 256 KiB each

for _ in range(3):
    look()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    look()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: bool) -> int:
    program = LOOKS.format(kept=kept)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return int(done.stdout)


def test_arrays_are_kept() -> None:
    without = faults(kept=False)
    if without < 1000:
        pytest.skip("this C library keeps them by itself")
    assert faults(kept=True) * 10 < without
