# SPDX-License-Identifier: MIT
"""Loading and unloading the module under test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOADED = Path("/sys/module/mergemem")


class Module:
    """mergemem.ko in the kernel of this guest."""

    def __init__(self) -> None:
        self.path = os.environ["MERGEMEM_KO"]

    @property
    def loaded(self) -> bool:
        """Whether it is loaded now."""
        return LOADED.exists()

    def load(self, **parameters: int) -> None:
        """insmod, with its parameters."""
        words = [f"{name}={value}" for name, value in parameters.items()]
        subprocess.run(["insmod", self.path, *words], check=True)

    def unload(self) -> None:
        """rmmod; it fails, rather than waits, when somebody uses the module."""
        subprocess.run(["rmmod", "mergemem"], check=True)

    def reload(self, **parameters: int) -> None:
        """Out and in again."""
        if self.loaded:
            self.unload()
        self.load(**parameters)

    @contextmanager
    def reloaded(self, **parameters: int) -> Iterator[None]:
        """Loaded with these parameters for a while, then without any again."""
        self.reload(**parameters)
        try:
            yield
        finally:
            self.reload()
