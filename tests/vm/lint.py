# SPDX-License-Identifier: MIT
"""The linters; each is a case with a name, and a missing tool is a failure, not a skip."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.vm import build, junit, kernels, provision, tree
from tests.vm.cache import BUILD, CHECKOUT
from tests.vm.steps import StepFailed, say

SKIPPED_DIRECTORIES = {".git", "build", "__pycache__", ".hypothesis", ".venv"}
# Files that can't carry a comment, or are the licence.
NO_LICENCE_LINE = {".md", ".json", ".png", ".svg", ".typed"}
# What checkpatch warns of and why it does not apply here.
CHECKPATCH_IGNORED = (
    "FILE_PATH_CHANGES",  # MAINTAINERS is a file of the kernel's tree
    "LINUX_VERSION_CODE",  # one source for several kernels; compat.h alone may ask
    "CONST_STRUCT",  # its list is of the newest tree's structs
    "ALLOC_WITH_SIZEOF",  # kvzalloc_obj() is of 7.x
    # The table of symbols is an X macro: a list of declarations, not an expression.
    "COMPLEX_MACRO",
    "MULTISTATEMENT_MACRO_USE_DO_WHILE",
    "TRAILING_SEMICOLON",
    # A compat macro drops the argument that one kernel has and another has not.
    "MACRO_ARG_UNUSED",
)
# In tests that ask whether the right word is suggested.
MISSPELT_ON_PURPOSE = "lokal,nam,nmae"
# Sparse follows no lock that one function takes and another drops, as page table walks do.
SPARSE_FLAGS = "-D__CHECK_ENDIAN__ -Wno-context"

# What is wrong, or nothing.
Check = Callable[[], str]


def files() -> list[Path]:
    """Every file of the project."""
    return sorted(_walk(CHECKOUT))


def _walk(directory: Path) -> Iterator[Path]:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            if path.name not in SKIPPED_DIRECTORIES and not path.name.endswith("_cache"):
                yield from _walk(path)
        elif path.is_file():
            yield path


def ruff_check() -> str:
    return _tool([provision.NEWEST / "bin/ruff", "check", "--quiet", "."])


def ruff_format() -> str:
    return _tool([provision.NEWEST / "bin/ruff", "format", "--check", "."])


def mypy() -> str:
    return _tool([provision.NEWEST / "bin/mypy"])


def shellcheck() -> str:
    return _tool(["shellcheck", *(path for path in files() if _is_shell(path))])


def codespell() -> str:
    return _tool(["codespell", f"--ignore-words-list={MISSPELT_ON_PURPOSE}", *files()])


def licences() -> str:
    """Every file says in its first lines under which licence it is."""
    bare = [
        str(path.relative_to(CHECKOUT))
        for path in files()
        if path.suffix not in NO_LICENCE_LINE
        and path.name not in ("LICENSE", "COPYING")
        and path.parent.name != "LICENSES"
        and path.stat().st_size
        and b"SPDX-License-Identifier: " not in path.read_bytes()[:400]
    ]
    return f"no SPDX line: {', '.join(bare)}" if bare else ""


def checkpatch() -> str:
    sources = [path for path in files() if path.suffix in (".c", ".h") and _is_kernel_code(path)]
    if not sources:
        return ""
    # Without --strict: that is for remarks of taste, which a reviewer weighs case by case.
    words: list[str | Path] = ["perl", provision.tools() / "checkpatch.pl", "--no-tree", "--terse"]
    words += ["--no-summary", "--max-line-length=100", f"--ignore={','.join(CHECKPATCH_IGNORED)}"]
    return _tool([*words, "--file", *sources])


def sparse() -> str:
    """Sparse on the module, for every kernel."""
    for kernel in kernels.load():
        unpacked = tree.get(kernel)
        directory = BUILD / "sparse" / kernel.name
        directory.mkdir(parents=True, exist_ok=True)
        try:
            copy = build.copy_sources(directory)
            build.make(unpacked, copy, "C=2", f"CF={SPARSE_FLAGS}")
        except StepFailed as failure:
            return str(failure)
    return ""


CHECKS: dict[str, Check] = {
    "ruff": ruff_check,
    "format": ruff_format,
    "mypy": mypy,
    "shellcheck": shellcheck,
    "codespell": codespell,
    "licences": licences,
    "checkpatch": checkpatch,
    "sparse": sparse,
}


def run(report: Path, names: Sequence[str] = ()) -> bool:
    """Run checks, show what they find, write a JUnit file; True when all are clean."""
    cases: list[tuple[str, float, str | None]] = []
    for name in names or CHECKS:
        started = time.monotonic()
        problem = CHECKS[name]().strip()
        seconds = time.monotonic() - started
        say(f"{'FAILED' if problem else 'ok':6} {name} ({seconds:.1f} s)")
        if problem:
            say(problem)
        cases.append((name, seconds, problem or None))
    junit.write(report, "lint", cases)
    return not any(problem for _, _, problem in cases)


def _tool(words: Sequence[str | Path]) -> str:
    try:
        done = subprocess.run(
            [str(word) for word in words],
            cwd=CHECKOUT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except FileNotFoundError:
        return f"{words[0]} is not installed"
    return (done.stdout or f"{words[0]}: exit status {done.returncode}") if done.returncode else ""


def _is_shell(path: Path) -> bool:
    with open(path, "rb") as file:
        first = file.readline(80)
    return first.startswith(b"#!") and first.split()[-1].split(b"/")[-1] in (
        b"sh",
        b"bash",
        b"dash",
    )


def _is_kernel_code(path: Path) -> bool:
    return path.relative_to(CHECKOUT).parts[0] == "kmod"
