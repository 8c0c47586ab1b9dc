# SPDX-License-Identifier: MIT
"""What the host needs before anything runs: each thing is made once and checked in no time."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.vm.cache import BUILD, CHECKOUT, cache_dir, content_key, locked, make_once
from tests.vm.debian import Archive, sudo
from tests.vm.kernels import load
from tests.vm.steps import run, step

PACKAGES = Path(__file__).with_name("packages.txt")
REQUIREMENTS = CHECKOUT / "tests/requirements.txt"
# Debian's own python3 only: no other finds bcc.
PYTHON = Path("/usr/bin/python3")
NEWEST = BUILD / "venv"
DEBIAN = BUILD / "venv-debian"


def listed(path: Path) -> list[str]:
    """The entries of a list with comments."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def packages() -> None:
    """Install the Debian packages that are missing."""
    wanted = listed(PACKAGES)
    query = ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *wanted]
    known = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    present = {line.split()[0] for line in known if line.endswith(" installed")}
    missing = [name for name in wanted if name not in present]
    if missing:
        with step(f"install Debian packages: {' '.join(missing)}"):
            apt = [*sudo(), "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"]
            run([*apt, "update"])
            run([*apt, "install", "-y", "--no-install-recommends", *missing], quiet=False)


def environments() -> None:
    """Both virtual environments: the newest libraries, and Debian's."""
    _environment(NEWEST, ["-r", str(REQUIREMENTS)])
    pinned = [
        line for line in listed(REQUIREMENTS) if line.startswith(("pytest==", "hypothesis=="))
    ]
    _environment(DEBIAN, pinned)


def _environment(directory: Path, wanted: Sequence[str]) -> None:
    # Paths into a virtual environment are absolute, so it is made in place, and its stamp last.
    key = content_key([REQUIREMENTS, *wanted, str(directory), platform.python_version()])
    stamp = directory / "made-from"
    with locked(directory):
        if stamp.exists() and stamp.read_text(encoding="utf-8") == key:
            return
        with step(f"make the virtual environment {directory.relative_to(CHECKOUT)}"):
            shutil.rmtree(directory, ignore_errors=True)
            run([PYTHON, "-m", "venv", "--system-site-packages", directory])
            run([directory / "bin/python", "-m", "pip", "install", "-q", *wanted])
            stamp.write_text(key, encoding="utf-8")


def tools() -> Path:
    """The directory of programs that are unpacked rather than installed: promtool, checkpatch.

    The prometheus package would start a server; checkpatch comes only with the kernel's source.
    """
    newest = load()[-1]
    key = content_key([Path(__file__), newest.name, *newest.suites])
    return make_once(cache_dir() / "tools" / key, _tools)


def _tools(into: Path) -> None:
    unpacked = into / "unpacked"
    with step("unpack promtool"):
        archive = Archive(["bookworm"])
        archive.update()
        archive.unpack([archive.show("prometheus")], unpacked)
        shutil.move(unpacked / "usr/bin/promtool", into)
        shutil.rmtree(unpacked)
    with step("unpack checkpatch from the kernel's source"):
        kernel = load()[-1]
        archive = Archive(kernel.suites)
        archive.update()
        # Of the series that the suites have now: "linux-source" depends on it.
        source = archive.closure(["linux-source"], re.compile("linux-source-"))[-1]
        archive.unpack([source], unpacked)
        scripts = ("checkpatch.pl", "spelling.txt", "const_structs.checkpatch")
        members = [f"{source.name}/scripts/{script}" for script in scripts]
        archived = unpacked / f"usr/src/{source.name}.tar.xz"
        run(["tar", "-xJf", archived, "-C", into, "--strip-components=2", *members])
        shutil.rmtree(unpacked)
