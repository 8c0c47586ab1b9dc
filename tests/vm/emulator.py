# SPDX-License-Identifier: MIT
"""QEMU 10, from Debian's backports, unpacked beside the QEMU 7.2 that is installed.

Linux patches its own code while it runs: static keys, static calls. QEMU 7.2 with several emulated
processors loses a race there every so often, and the guest dies of an `Oops: int3` that is nobody's
fault. QEMU 10 does not. The installed package brings libraries and firmware, which serve both.
"""

from __future__ import annotations

from pathlib import Path

from tests.vm.cache import cache_dir, content_key, make_once
from tests.vm.debian import Archive
from tests.vm.steps import StepFailed, run, say, step

SUITE = "bookworm-backports"
PACKAGES = ("qemu-system-x86", "qemu-system-data")
INSTALLED = "qemu-system-x86_64"
# Where each version looks for firmware; what belongs to QEMU itself comes with it.
FIRMWARE = (Path("/usr/share/seabios"), Path("/usr/share/qemu"))


def command() -> list[str]:
    """The emulator, and where its firmware is."""
    key = content_key([Path(__file__)])
    root = make_once(cache_dir() / "emulator" / key, _unpack) / "root"
    program = root / "usr/bin" / INSTALLED
    if not program.exists():
        return [INSTALLED]
    directories = (root / "usr/share/qemu", *FIRMWARE)
    return [str(program), *(word for path in directories for word in ("-L", str(path)))]


def _unpack(into: Path) -> None:
    root = into / "root"
    with step("unpack QEMU 10"):
        archive = Archive([SUITE])
        archive.update()
        archive.unpack([archive.show(name) for name in PACKAGES], root)
        try:
            run([root / "usr/bin" / INSTALLED, "--version"])
        except StepFailed as failure:
            # Say so once, and go on with the other one: most of its guests live.
            say(f"QEMU 10 does not run here, so the installed one is used: {failure}")
            (root / "usr/bin" / INSTALLED).unlink()
