# SPDX-License-Identifier: MIT
"""The table of supported kernels, `kernels.toml`, and the README's table made from it."""

from __future__ import annotations

import argparse
import math
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("kernels.toml")
TOOLCHAINS = ("host", "trixie")
BOOTS = ("vmlinux", "bzimage")


class TableError(Exception):
    """The table says something that the rig doesn't understand."""


@dataclass(frozen=True)
class Skip:
    """A test that may skip, or one that did: "test_swap.py::test_it", and why."""

    tests: str
    reason: str

    def accounts_for(self, other: Skip) -> bool:
        return self.reason == other.reason and fnmatchcase(other.tests, self.tests)


@dataclass(frozen=True)
class Kernel:
    name: str
    release: str
    suites: tuple[str, ...]
    packages: tuple[str, ...]
    toolchain: str
    boot: str
    skips: tuple[Skip, ...] = ()

    def is_version(self, version: str) -> bool:
        """Whether a version is of this series: 6.1.192-2 of "6.1", 7.3.4 of "7.x"."""
        return version.startswith(self.name.removesuffix("x").rstrip(".") + ".")


def parse(text: str) -> tuple[Kernel, ...]:
    """The kernels of a table, oldest first."""
    kernels = [_kernel(entry) for entry in tomllib.loads(text).get("kernel", [])]
    names = [kernel.name for kernel in kernels]
    if not kernels:
        raise TableError("the table names no kernel")
    if len(set(names)) != len(names):
        raise TableError(f"a kernel is named twice: {', '.join(names)}")
    return tuple(sorted(kernels, key=_by_version))


def load() -> tuple[Kernel, ...]:
    return parse(TABLE.read_text(encoding="utf-8"))


def unit_skips() -> tuple[Skip, ...]:
    """What unit tests may skip: they run on the host, which may be anything."""
    entries = tomllib.loads(TABLE.read_text(encoding="utf-8"))["unit"]["skips"]
    return tuple(_skip("unit", entry) for entry in entries)


def debug() -> Kernel:
    """The debug kernel, which is none of the supported ones: it answers to its name only."""
    return _kernel(tomllib.loads(TABLE.read_text(encoding="utf-8"))["debug"])


def select(kernels: Sequence[Kernel], names: str | None) -> tuple[Kernel, ...]:
    """The kernels named in a list such as "6.1,6.12"; all of them when nothing is named."""
    if not names:
        return tuple(kernels)
    by_name = {kernel.name: kernel for kernel in (*kernels, debug())}
    wanted = names.replace(",", " ").split()
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        raise TableError(f"no kernel {', '.join(unknown)}; there are {', '.join(by_name)}")
    return tuple(by_name[name] for name in wanted)


def find(name: str) -> Kernel:
    """One kernel by name; "newest" is the last of the table."""
    kernels = load()
    return kernels[-1] if name == "newest" else select(kernels, name)[0]


def markdown(kernels: Sequence[Kernel]) -> str:
    """The support table of the README."""
    rows = [f"| {kernel.name} | {kernel.release} |" for kernel in kernels]
    return "\n".join(["| Kernel | Where it comes from |", "|---|---|", *rows]) + "\n"


def _kernel(entry: dict[str, Any]) -> Kernel:
    known = {field.name for field in fields(Kernel)}
    needed = {field.name for field in fields(Kernel) if field.default is MISSING}
    if not needed <= set(entry) <= known:
        odd = ", ".join(sorted((set(entry) - known) | (needed - set(entry))))
        raise TableError(f"kernel {entry.get('name', '?')}: missing or unknown: {odd}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    values["skips"] = tuple(_skip(entry["name"], skip) for skip in values.get("skips", ()))
    kernel = Kernel(**values)
    if kernel.toolchain not in TOOLCHAINS:
        raise TableError(f"kernel {kernel.name}: toolchain is one of {', '.join(TOOLCHAINS)}")
    if kernel.boot not in BOOTS:
        raise TableError(f"kernel {kernel.name}: boot is one of {', '.join(BOOTS)}")
    return kernel


def _skip(kernel: str, entry: Any) -> Skip:
    wanted = {field.name for field in fields(Skip)}
    if not isinstance(entry, dict) or set(entry) != wanted or not all(entry.values()):
        raise TableError(f"{kernel}: a skip has {' and '.join(sorted(wanted))}: {entry!r}")
    return Skip(**entry)


def _by_version(kernel: Kernel) -> tuple[float, ...]:
    *parts, last = kernel.name.split(".")
    try:
        # "7.x" comes after every 7.1 and 7.2.
        newest = math.inf if last == "x" and parts else int(last)
        return (*(int(part) for part in parts), newest)
    except ValueError:
        raise TableError(
            f"kernel {kernel.name!r}: the name is a version such as 6.1 or 7.x"
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.vm.kernels", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="print the README's table")
    wanted = parser.parse_args(arguments)
    kernels = load()
    if wanted.markdown:
        sys.stdout.write(markdown(kernels))
    else:
        print(" ".join(kernel.name for kernel in kernels))
    return 0


if __name__ == "__main__":
    sys.exit(main())
