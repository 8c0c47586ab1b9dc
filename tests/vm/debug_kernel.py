# SPDX-License-Identifier: MIT
"""The debug kernel: Debian's source, built here with `debug.config`, kept in the cache.

It is offered by name (KERNEL=debug) and is no row of the table of supported kernels: nobody runs
it, and `make test` must not wait for its build.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.vm import tree
from tests.vm.cache import cache_dir, content_key, make_once
from tests.vm.debian import Archive, Package
from tests.vm.kernels import Kernel
from tests.vm.steps import StepFailed, run, step

CONFIG = Path(__file__).with_name("debug.config")
# Of a built kernel, what building a module takes; the rest of two gigabytes goes.
KEPT = {"Kbuild", "Kconfig", "Makefile", "Module.symvers", ".config"}
KEPT |= {"arch", "include", "scripts", "tools"}
KEPT_BELOW = {"arch": {"Kconfig", "x86"}, "tools": {"objtool"}}


def get(kernel: Kernel, packages: dict[str, str]) -> tree.Tree:
    """The debug kernel, built if the cache has none of this source, configuration and compiler."""
    ((name, version),) = packages.items()
    compiler = run(["gcc", "-dumpfullversion"]).strip()
    key = content_key([CONFIG, name, version, compiler])
    directory = make_once(
        cache_dir() / "kernels" / kernel.name / f"{version.replace('~', '-')}-{key}",
        lambda into: _make(kernel, Package(name, version, ""), into),
    )
    release = (directory / "release").read_text(encoding="utf-8").strip()
    return tree.Tree(kernel, directory, release)


def _make(kernel: Kernel, source: Package, into: Path) -> None:
    build = into / "build"
    with step(f"debug kernel: download and unpack {source.name} {source.version}"):
        _unpack(kernel, source, into, build)
    with step(f"debug kernel: configure, {CONFIG.name} over tinyconfig"):
        _configure(build)
    with step("debug kernel: compile (a quarter of an hour on two cores)"):
        _kbuild(build, f"-j{os.cpu_count() or 1}", "bzImage", "modules")
    with step("debug kernel: install into the cache"):
        release = _install(build, into / "root")
        _prune(build)
        (into / "release").write_text(release + "\n", encoding="utf-8")


def _unpack(kernel: Kernel, source: Package, into: Path, build: Path) -> None:
    unpacked = into / "unpacked"
    Archive(kernel.suites).unpack([source], unpacked)
    build.mkdir()
    archive = unpacked / f"usr/src/{source.name}.tar.xz"
    run(["tar", "-xJf", archive, "-C", build, "--strip-components=1"])
    shutil.rmtree(unpacked)


def _configure(build: Path) -> None:
    _kbuild(build, "tinyconfig")
    merge = ["scripts/kconfig/merge_config.sh", "-m", ".config", str(CONFIG)]
    run(merge, cwd=build, env=_environment())
    _kbuild(build, "olddefconfig")
    refused = unmet(
        CONFIG.read_text(encoding="utf-8"), (build / ".config").read_text(encoding="utf-8")
    )
    if refused:
        # Kconfig drops what depends on something absent, without a word.
        raise StepFailed(f"{CONFIG.name}: this source does not take {', '.join(refused)}")


def unmet(wanted: str, configured: str) -> list[str]:
    """The settings of a fragment that a configuration lacks."""
    present = set(configured.splitlines())
    prefixes = ("CONFIG_", "# CONFIG_")
    return [x for x in wanted.splitlines() if x.startswith(prefixes) and x not in present]


def _install(build: Path, root: Path) -> str:
    """Lay the kernel out as an installed one; its release."""
    modules = root / "usr"
    _kbuild(build, f"INSTALL_MOD_PATH={modules}", "modules_install")
    release = (build / "include/config/kernel.release").read_text(encoding="utf-8").strip()
    boot = root / "boot"
    boot.mkdir()
    shutil.copy(build / "arch/x86/boot/bzImage", boot / f"vmlinuz-{release}")
    shutil.copy(build / ".config", boot / f"config-{release}")
    shutil.copy(build / "System.map", boot / f"System.map-{release}")
    for name in ("build", "source"):
        link = modules / "lib/modules" / release / name
        link.unlink(missing_ok=True)
    # Relative, since the directory is renamed when it is done.
    (modules / "lib/modules" / release / "build").symlink_to("../../../../../build")
    return release


def _prune(build: Path) -> None:
    for parent, kept in [(build, KEPT), *((build / name, k) for name, k in KEPT_BELOW.items())]:
        for path in parent.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in (build / "arch").rglob("*"):
        if path.suffix in {".c", ".S", ".o", ".a", ".cmd"} or path.name.startswith("vmlinux"):
            path.unlink()


def _kbuild(build: Path, *words: str) -> None:
    run(["nice", "make", "-s", "-C", build, *words], env=_environment())


def _environment() -> dict[str, str]:
    # Our own make exports its variables, and the kernel's makefiles would take them for theirs.
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return kept | {"LANG": "C", "KBUILD_BUILD_USER": "mergemem", "KBUILD_BUILD_HOST": "rig"}
