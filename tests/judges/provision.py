# SPDX-License-Identifier: MIT
"""The judges' programs and the merger: made on the host, found again in the guest."""

from __future__ import annotations

import re
from pathlib import Path

from tests.vm.cache import BUILD, cache_dir, content_key, locked, make_once
from tests.vm.debian import Archive
from tests.vm.provision import listed
from tests.vm.steps import run, step

HERE = Path(__file__).parent
PACKAGES = HERE / "packages.txt"
SUITES = ("bookworm", "bookworm-security")
MERGER = BUILD / "merger"
CONTRACT = HERE.parents[1] / "kmod" / "uapi" / "mergemem.h"
NOTHING_ELSE = re.compile(r"(?!)")


def prepare() -> None:
    """Everything that the judges need, made if it is not there yet."""
    build_merger()
    make_once(_unpacked(), _unpack)


def root() -> Path:
    """Where the packages are unpacked; prepare() must have been called on the host."""
    directory = _unpacked() / "root"
    if not directory.exists():
        raise FileNotFoundError(
            f"{directory}: the judges' packages are not unpacked; on the host, call "
            "python3 -m tests.judges --prepare"
        )
    return directory


def _unpacked() -> Path:
    return cache_dir() / "judges" / content_key([*listed(PACKAGES), *SUITES])


def _unpack(into: Path) -> None:
    with step("unpack the judges' Debian packages"):
        archive = Archive(SUITES)
        archive.update()
        archive.unpack(archive.closure(listed(PACKAGES), NOTHING_ELSE), into / "root")


def build_merger() -> Path:
    """The merger; static, as it must run whatever it merges."""
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-static"]
    files = [*sorted(HERE.glob("*.[ch]")), CONTRACT]
    key = content_key([*flags, *(path.name for path in files), *files])
    stamp = MERGER.with_suffix(".built")
    with locked(MERGER):
        if not MERGER.exists() or not stamp.exists() or stamp.read_text(encoding="utf-8") != key:
            with step("build the judges' merger"):
                run(["gcc", *flags, "-o", MERGER.with_suffix(".new"), HERE / "merger.c"])
                MERGER.with_suffix(".new").rename(MERGER)
                stamp.write_text(key, encoding="utf-8")
    return MERGER
