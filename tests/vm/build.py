# SPDX-License-Identifier: MIT
"""Building mergemem.ko for the kernels of the table, and the tests' helper program."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.vm.cache import BUILD, CHECKOUT, content_key, locked
from tests.vm.steps import StepFailed, run, step
from tests.vm.tree import Tree

SOURCES = CHECKOUT / "kmod"
ACTOR_SOURCE = CHECKOUT / "tests/kernel/actor.c"
ACTOR = BUILD / "actor"
SUFFIXES = {".c", ".h", ".S"}
# Said of every module that is built outside of the kernel's own tree.
EXPECTED = ("Skipping BTF generation",)


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
        if old.relative_to(directory) not in wanted and not old.name.endswith(".mod.c"):
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
    if tree.kernel.toolchain != "host":
        raise StepFailed(f"no toolchain {tree.kernel.toolchain} yet")
    words = ["make", "-C", str(tree.headers), f"M={directory}", "W=1", "KCFLAGS=-Werror"]
    words += [*arguments, "modules"]
    # modpost and objtool warn without failing, so their words count too.
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.splitlines()
    warnings = [line for line in lines if "warning" in line.lower()]
    warnings = [line for line in warnings if not any(known in line for known in EXPECTED)]
    if done.returncode or warnings:
        sys.stderr.write(done.stdout)
        raise StepFailed(f"{tree.release}: {warnings[0] if warnings else 'the build failed'}")


def actor() -> Path | None:
    """The program whose memory the guest tests look at; static, so that its mappings are few."""
    if not ACTOR_SOURCE.exists():
        return None
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread"]
    files = sorted(ACTOR_SOURCE.parent.glob("*.[ch]"))
    key = content_key([*flags, *(path.name for path in files), *files])
    stamp = ACTOR.with_suffix(".built")
    with locked(ACTOR):
        if not ACTOR.exists() or not stamp.exists() or stamp.read_text(encoding="utf-8") != key:
            with step("build the guest tests' actor"):
                run(["gcc", *flags, "-o", ACTOR.with_suffix(".new"), ACTOR_SOURCE])
                ACTOR.with_suffix(".new").rename(ACTOR)
                stamp.write_text(key, encoding="utf-8")
    return ACTOR
