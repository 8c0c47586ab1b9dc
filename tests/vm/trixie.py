# SPDX-License-Identifier: MIT
"""A Debian 13 to work in: its Python, its libraries, its compiler. Made once, kept in the cache."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.vm.cache import cache_dir, content_key, make_once
from tests.vm.debian import mirrors, sudo
from tests.vm.steps import run, step

PACKAGES = (
    # unit tests
    "gcc",
    "libc6-dev",
    "python3",
    "python3-hypothesis",
    "python3-jsonschema",
    "python3-numpy",
    "python3-prometheus-client",
    "python3-pytest",
    "python3-yaml",
    # kernel modules: the tools that come with the headers are linked with these libraries
    "gcc-14",
    "libelf1t64",
    "libssl3t64",
    "make",
    "pahole",
    "sparse",
)
# A mount namespace of its own, so nothing mounted here is seen, or left, outside.
SCRIPT = """
root=$1 user=$2
shift 2
while [ "$1" != -- ]; do
    mount --bind "$1" "$root$2"
    shift 2
done
shift
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmp "$root/tmp"
exec chroot --userspec="$user" "$root" sh -c 'cd /mnt && exec "$@"' sh "$@"
"""


def root() -> Path:
    return make_once(cache_dir() / "trixie" / content_key([*PACKAGES, "trixie"]), _make) / "root"


def command(
    words: Sequence[str | Path], *, mounts: Mapping[str, Path], user: str = "0:0"
) -> list[str]:
    """What runs `words` there, in /mnt, with directories of the host at places that it has."""
    pairs = [str(word) for place, path in mounts.items() for word in (path, place)]
    enter = [*sudo(), "unshare", "--mount", "--propagation", "private", "sh", "-euc", SCRIPT, "sh"]
    clean = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin:/opt", "HOME=/root", "LANG=C.UTF-8"]
    return [*enter, str(root()), user, *pairs, "--", *clean, *map(str, words)]


def ourselves() -> str:
    """The user to run as for files that shall be ours outside."""
    return f"+{os.getuid()}:+{os.getgid()}"


def _make(into: Path) -> None:
    main, _ = mirrors()
    with step("debootstrap a Debian 13 for its Python, libraries and compiler (some two minutes)"):
        options = ["--variant=minbase", f"--include={','.join(PACKAGES)}"]
        run([*sudo(), "debootstrap", *options, "trixie", into / "root", main])
        run([*sudo(), "chroot", into / "root", "apt-get", "clean"])
