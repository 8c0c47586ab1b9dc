# SPDX-License-Identifier: MIT
"""A program that only sleeps, and that nobody else on this host runs.

A copy of sleep(1): policies choose processes by their executable, and others run that one, too.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

_directory = tempfile.mkdtemp(prefix="mergemem-sleeper-")
atexit.register(shutil.rmtree, _directory, ignore_errors=True)

# Resolved, as /proc tells the paths of executables.
SLEEPER = os.path.realpath(shutil.copy(os.path.realpath("/bin/sleep"), _directory))
