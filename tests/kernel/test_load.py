# SPDX-License-Identifier: MIT
"""A kernel that lacks what the module needs: it refuses to load, and says so in one line."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.kernel.kernel_log import KernelLog
from tests.kernel.module import Module

NEEDED = b"folio_free_swap"
LACKING = b"folio_free_swaq"


def test_missing_symbol(module: Module, tmp_path: Path) -> None:
    """The module looks for a name that no kernel has, in the place of one that it needs."""
    text = Path(module.path).read_bytes()
    for before in (b"\0", b" "):  # the name that is looked up, and the one that is printed
        literal = before + NEEDED + b"\0"
        assert literal in text
        text = text.replace(literal, before + LACKING + b"\0")
    changed = tmp_path / "mergemem.ko"
    changed.write_bytes(text)

    module.unload()
    log = KernelLog()
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(["insmod", changed], check=True, capture_output=True)
    lines = [line for line in log.read() if "cannot load" in line]
    log.close()

    assert lines == [f"mergemem: cannot load: this kernel lacks {LACKING.decode()}"]
    assert not module.loaded
    module.load()
