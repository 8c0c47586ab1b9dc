# SPDX-License-Identifier: MIT
"""A guest for the judges."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.judges import provision
from tests.vm import provision as rig
from tests.vm.guest import Guest, GuestError
from tests.vm.kernels import TableError
from tests.vm.steps import StepFailed

MEMORY_MIB = 3072
SWAP_MIB = 512
# All judges take some ten minutes; --seconds may make that much more.
TIME_LIMIT_SECONDS = 2 * 3600
MODULE = Path("/sys/module/mergemem")


def run(words: Sequence[str], kernel: str) -> int:
    """Boot a guest and run the same command line there."""
    try:
        rig.packages()
        provision.prepare()
        guest = Guest(kernel=kernel, memory_mib=MEMORY_MIB, swap_mib=SWAP_MIB)
        command = [sys.executable, "-m", "tests.judges", *words]
        env = {"PYTHONDONTWRITEBYTECODE": "1"}
        guest.run(command, env=env, time_limit_seconds=TIME_LIMIT_SECONDS).check()
    except GuestError as verdict:
        print(f"{type(verdict).__name__}: {verdict}", file=sys.stderr)
        return verdict.exit_status
    except (StepFailed, TableError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


def load_module() -> None:
    """In the guest: unless a soak has loaded it."""
    if not MODULE.exists():
        subprocess.run(["insmod", os.environ["MERGEMEM_KO"]], check=True)
