# SPDX-License-Identifier: MIT
"""Building mergemem.ko for the kernels of the table, and the tests' helper programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.vm import trixie
from tests.vm.cache import BUILD, CHECKOUT, content_key, locked
from tests.vm.steps import StepFailed, run, step
from tests.vm.tree import Tree

SOURCES = CHECKOUT / "kmod"
HELPER_SOURCES = CHECKOUT / "tests/kernel"
HELPERS = ("actor", "clients", "fuzz")
SUFFIXES = {".c", ".h", ".S", ".sh"}
# What a build leaves beside its sources.
MADE = (".mod.c", "facts.h")
# Said of every module that is built outside of the kernel's own tree.
EXPECTED = ("Skipping BTF generation",)
# What kmod/compat.h says of a kernel that lacks what it looks for.
UNKNOWN_KERNEL = "mergemem does not know this kernel"


def sources(root: Path = SOURCES) -> list[Path]:
    """The files a build reads, sorted."""
    names = {"Kbuild", "Makefile"}
    return sorted(p for p in root.rglob("*") if p.suffix in SUFFIXES or p.name in names)


def module(tree: Tree) -> Path:
    """mergemem.ko for a kernel, built with W=1 if its sources have changed; warnings fail."""
    files = sources()
    directory = BUILD / "kmod" / tree.kernel.name
    target = directory / "mergemem.ko"
    with locked(directory):
        names = [str(path.relative_to(SOURCES)) for path in files]
        key = content_key([*names, *files, str(tree.directory), Path(__file__)])
        stamp = directory / "built"
        if target.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == key:
            return target
        with step(f"kernel {tree.kernel.name}: build mergemem.ko for {tree.release}"):
            stamp.unlink(missing_ok=True)
            try:
                make(tree, copy_sources(directory))
            except StepFailed:
                # Or the next build would find the objects that were warned of, and be silent.
                shutil.rmtree(directory)
                raise
            stamp.write_text(key, encoding="utf-8")
    return target


def copy_sources(directory: Path, root: Path = SOURCES) -> Path:
    """A copy to build in: 6.1 has no MO=, and one tree can't serve two kernels."""
    wanted = {path.relative_to(root) for path in sources(root)}
    for old in sources(directory):
        if old.relative_to(directory) not in wanted and not old.name.endswith(MADE):
            old.unlink()
    for name in wanted:
        source, copy = root / name, directory / name
        # Unchanged files keep their times, so make rebuilds only what it must.
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
    return directory


def make(tree: Tree, directory: Path, *arguments: str) -> None:
    """The kernel's build of a module, in which any warning is an error."""
    problems, output = attempt(tree, directory, *arguments)
    if problems:
        sys.stderr.write(output)
        raise StepFailed(f"{tree.release}: {problems[0]}")


def attempt(tree: Tree, directory: Path, *arguments: str) -> tuple[list[str], str]:
    """What is wrong with a module, the most telling first, and all that the build says."""
    done = subprocess.run(
        _make_command(tree, directory, arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    # modpost and objtool warn without failing, so their words count too.
    lines = [line for line in done.stdout.splitlines() if not any(x in line for x in EXPECTED)]
    unknown = [line for line in lines if UNKNOWN_KERNEL in line and "error: #error" in line]
    errors = [line for line in lines if " error: " in line and line not in unknown]
    problems = unknown + errors + [line for line in lines if "warning" in line.lower()]
    if done.returncode and not problems:
        problems = ["the build failed"]
    return problems, done.stdout


def _make_command(tree: Tree, directory: Path, arguments: Sequence[str]) -> list[str]:
    words = [f"-j{os.cpu_count() or 1}", "W=1", "KCFLAGS=-Werror", *arguments, "modules"]
    if tree.kernel.toolchain == "host":
        return ["make", "-C", str(tree.headers), f"M={directory}", *words]
    headers = Path("/opt") / tree.headers.relative_to(tree.root)
    copy = Path("/mnt") / directory.relative_to(CHECKOUT)
    return trixie.command(
        ["make", "-C", headers, f"M={copy}", *words],
        mounts={"/mnt": CHECKOUT, "/opt": tree.root},
        user=trixie.ourselves(),
    )


def helpers() -> None:
    """The programs of the guest tests that are written in C."""
    for name in HELPERS:
        _helper(name)


def _helper(name: str) -> None:
    # Static, so that its mappings are few, and that it runs in any root.
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread"]
    source, target = HELPER_SOURCES / f"{name}.c", BUILD / name
    # One header is the module's.
    files = [*sorted(HELPER_SOURCES.glob("*.[ch]")), *sorted(SOURCES.glob("uapi/*.h"))]
    key = content_key([*flags, *(path.name for path in files), *files])
    stamp = target.with_suffix(".built")
    with locked(target):
        if not target.exists() or not stamp.exists() or stamp.read_text(encoding="utf-8") != key:
            with step(f"build the guest tests' program {name}"):
                run(["gcc", *flags, "-o", target.with_suffix(".new"), source])
                target.with_suffix(".new").rename(target)
                stamp.write_text(key, encoding="utf-8")
