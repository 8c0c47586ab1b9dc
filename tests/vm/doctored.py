# SPDX-License-Identifier: MIT
"""A kernel that no longer has some functions: does the module's build say which?

For a kernel newer than those of the table, mergemem either builds or names each fact that it
misses. Such a kernel is made from the headers of a real one, by giving functions other names.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.vm import build
from tests.vm.cache import BUILD, cache_dir
from tests.vm.steps import run
from tests.vm.tree import Tree

# One that every kernel needs, and of each choice in compat.h what the newest kernel has.
FUNCTIONS = (
    "vm_normal_page",
    "pte_offset_map_lock",
    "folio_add_file_rmap_ptes",
    "get_user_pages_remote",
    "mmu_notifier_range_init",
    "task_exec_state_get_dumpable",
)


def unnamed(tree: Tree, functions: Sequence[str] = FUNCTIONS) -> str:
    """What is wrong with what the build says of a kernel without these functions."""
    directory = BUILD / "doctored"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    build.copy_sources(directory)
    with _without(tree, functions) as doctored:
        problems, output = build.attempt(doctored, directory)
    said = [line for line in problems if build.UNKNOWN_KERNEL in line]
    silent = [name for name in functions if not any(f"{name}()" in line for line in said)]
    if not silent:
        return ""
    return f"built without {', '.join(functions)}, but not a word of {', '.join(silent)}:\n{output}"


@contextmanager
def _without(tree: Tree, functions: Sequence[str]) -> Iterator[Tree]:
    # In the cache, so that files can be shared with the real kernel by hard links.
    with tempfile.TemporaryDirectory(prefix=".doctored-", dir=cache_dir()) as name:
        root = Path(name) / "root"
        shutil.copytree(tree.root / "usr/src", root / "usr/src", symlinks=True, copy_function=_link)
        for tools in tree.root.glob("usr/lib/linux-kbuild-*"):
            shutil.copytree(
                tools, root / "usr/lib" / tools.name, symlinks=True, copy_function=_link
            )
        modules = root / "usr/lib/modules" / tree.release
        modules.mkdir(parents=True)
        (modules / "build").symlink_to(tree.headers.readlink())
        _rename(root / "usr/src", functions)
        yield Tree(tree.kernel, Path(name), tree.release)


def _link(source: str, copy: str) -> str:
    Path(copy).hardlink_to(source)
    return copy


def _rename(headers: Path, functions: Sequence[str]) -> None:
    words = re.compile(rf"\b({'|'.join(functions)})\b")
    found = run(["grep", "-rlwE", "--include=*.h", "|".join(functions), headers])
    for path in map(Path, found.splitlines()):
        text = words.sub(r"\1_of_old", path.read_text(encoding="utf-8"))
        # A new file: the old one is the real kernel's too.
        path.unlink()
        path.write_text(text, encoding="utf-8")
