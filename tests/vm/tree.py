# SPDX-License-Identifier: MIT
"""An unpacked Debian kernel in the cache: image, modules, headers."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

from tests.vm import vmlinux
from tests.vm.cache import cache_dir, locked, make_once
from tests.vm.debian import Archive, Package
from tests.vm.kernels import Kernel, debug
from tests.vm.steps import StepFailed, run, say, step

# Packages that together are a kernel; what else they depend on (initramfs-tools, compilers)
# belongs to an installation, and this is none.
PARTS = re.compile(r"linux-(image|base|binary|modules|headers|kbuild)-")
# How long "the newest" is trusted before the archive is asked again.
FRESH_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Tree:
    """`root` is laid over the guest's file system, so it looks like an installed kernel."""

    kernel: Kernel
    directory: Path
    release: str

    @property
    def root(self) -> Path:
        return self.directory / "root"

    @property
    def modules(self) -> Path:
        return self.root / "usr/lib/modules" / self.release

    @property
    def headers(self) -> Path:
        """What `make -C` takes to build a module."""
        return self.modules / "build"

    @property
    def image(self) -> Path:
        if self.kernel.boot == "vmlinux":
            return self.directory / "vmlinux"
        return bzimage(self.root, self.release)

    @property
    def config(self) -> Path:
        return self.root / "boot" / f"config-{self.release}"


def get(kernel: Kernel) -> Tree:
    """The newest build of a kernel, fetched or built if it is not in the cache."""
    home = cache_dir() / "kernels" / kernel.name
    with locked(home / "newest.json"):
        packages = _newest(kernel, home / "newest.json")
    if kernel == debug():
        from tests.vm import debug_kernel  # which needs us

        return debug_kernel.get(kernel, packages)
    version = next(iter(packages.values()))
    directory = make_once(
        home / version.replace("~", "-"), lambda into: _make(kernel, packages, into)
    )
    release = (directory / "release").read_text(encoding="utf-8").strip()
    return Tree(kernel, directory, release)


def bzimage(root: Path, release: str) -> Path:
    for place in (
        root / "boot" / f"vmlinuz-{release}",
        root / "usr/lib/modules" / release / "vmlinuz",
    ):
        if place.exists():
            return place
    raise StepFailed(f"no vmlinuz of {release} among the unpacked packages")


def _newest(kernel: Kernel, remembered: Path) -> dict[str, str]:
    """Package names and versions of the newest build; asked once a day."""
    known: dict[str, str] = {}
    if remembered.exists():
        known = json.loads(remembered.read_text(encoding="utf-8"))
        if time.time() - remembered.stat().st_mtime < FRESH_SECONDS:
            return known
    try:
        with step(f"kernel {kernel.name}: look for the newest build"):
            archive = Archive(kernel.suites)
            archive.update()
            packages = {p.name: p.version for p in archive.closure(kernel.packages, PARTS)}
            _check_series(kernel, packages)
    except StepFailed as failure:
        if not known:
            raise
        say(
            f"kernel {kernel.name}: keeping the cached build, the archive did not answer: {failure}"
        )
        return known
    fresh = remembered.with_suffix(".new")
    fresh.write_text(json.dumps(packages, indent=1), encoding="utf-8")
    fresh.rename(remembered)
    return packages


def _check_series(kernel: Kernel, packages: dict[str, str]) -> None:
    version = next(iter(packages.values()))
    if kernel != debug() and not kernel.is_version(version):
        raise StepFailed(
            f"{', '.join(kernel.suites)} now have {version}, which is no {kernel.name}; "
            "kernels.toml needs a row for it"
        )


def _make(kernel: Kernel, packages: dict[str, str], into: Path) -> None:
    root = into / "root"
    with step(f"kernel {kernel.name}: download and unpack"):
        wanted = [Package(name, version, "") for name, version in packages.items()]
        Archive(kernel.suites).unpack(wanted, root)
    with step(f"kernel {kernel.name}: prepare"):
        _merge_usr(root)
        relocate(root)
        (modules,) = (root / "usr/lib/modules").iterdir()
        release = modules.name
        run(["/sbin/depmod", "-b", root / "usr", release])
        if kernel.boot == "vmlinux":
            vmlinux.extract(bzimage(root, release), into / "vmlinux")
        (into / "release").write_text(release + "\n", encoding="utf-8")


def _merge_usr(root: Path) -> None:
    """Older packages ship /lib; laid over a merged-/usr system that would hide the symlink."""
    if (root / "lib").exists():
        (root / "usr/lib").mkdir(parents=True, exist_ok=True)
        run(["cp", "-a", "--link", f"{root}/lib/.", root / "usr/lib"])
        run(["rm", "-r", root / "lib"])


def relocate(root: Path) -> None:
    """Make the headers usable where they lie: their paths are absolute, as if installed."""
    for link in (root / "usr/lib/modules").glob("*/*"):
        if link.is_symlink() and str(link.readlink()).startswith("/usr/"):
            target = Path("../../../..") / str(link.readlink())[1:]
            link.unlink()
            link.symlink_to(target)
    for makefile in (root / "usr/src").glob("linux-headers-*/Makefile"):
        text = makefile.read_text(encoding="utf-8")
        if "/usr/src/" in text:
            makefile.unlink()
            # At once: what the last makefile is changes with every include.
            here = ":= $(dir $(realpath $(lastword $(MAKEFILE_LIST))))../"
            text = text.replace("=/usr/src/", here).replace("/usr/src/", here.removeprefix(":= "))
            makefile.write_text(text, encoding="utf-8")
