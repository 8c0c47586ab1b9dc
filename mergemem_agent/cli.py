# SPDX-License-Identifier: MIT
"""The command `mergemem`: a table of commands, each a module that is imported when it is run."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mergemem_agent import __version__
from mergemem_agent.error import MergememError

USAGE_STATUS: Final = 2


@dataclass(frozen=True)
class Command:
    """One command: `module` has a main(arguments) -> exit status; `prefix` goes before them."""

    name: str
    module: str
    sentence: str
    prefix: tuple[str, ...] = ()


COMMANDS: Final = (
    Command("agent", "agent", "find and merge equal pages, by the policies, until stopped"),
    Command("estimate", "estimate", "dry run without the module: what merging would free"),
    Command("merge", "oneshot", "merge equal pages of some processes, once"),
    Command("unmerge", "unmerge", "give processes, or all of them, private pages again"),
    Command("status", "status", "what module and agent are doing"),
    Command("policy", "explain", "check policy files; say which policy takes a process, and why"),
    Command("doctor", "doctor", "check kernel, module and permissions, and say what to do"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit status: 0 done, 1 failed, 2 wrong usage."""
    try:
        try:
            return _run(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()  # here, where a reader that has gone can still be handled
    except MergememError as error:
        print(f"mergemem: {error.message}", file=sys.stderr)
        if error.hint:
            print(error.hint, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does. Keep Python from saying so at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if given else USAGE_STATUS
    if given[0] == "--version":
        print(f"mergemem {__version__}")
        return 0
    command = next((command for command in COMMANDS if command.name == given[0]), None)
    if command is None:
        print(f"mergemem: there is no command {given[0]!r}\n\n{_usage()}", file=sys.stderr)
        return USAGE_STATUS
    avoid_slow_sort()
    module = importlib.import_module(f"mergemem_agent.{command.module}")
    return int(module.main([*command.prefix, *given[1:]]))


def avoid_slow_sort(cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """On AMD family 0x19 (Zen 3 and 4), have numpy sort with AVX2: 3 to 7 times faster there.

    Zen 4 runs the compress-store instruction of numpy's AVX-512 sort in microcode. This must
    happen before numpy is imported; a choice that the environment has made already stands.
    """
    try:
        text = cpuinfo.read_text(encoding="ascii", errors="replace")
        numpy_version = importlib.metadata.version("numpy")
    except (OSError, importlib.metadata.PackageNotFoundError):
        return
    first_processor = re.sub(r"[ \t]+", " ", text.split("\n\n", 1)[0]).splitlines()
    if not {"vendor_id : AuthenticAMD", f"cpu family : {0x19}"} <= set(first_processor):
        return
    major, minor = (int(part) for part in numpy_version.split(".")[:2])
    names = (
        "X86_V4 AVX512_ICL"  # numpy 2.4 has names for groups of features
        if (major, minor) >= (2, 4)
        else "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL"
    )
    os.environ.setdefault("NPY_DISABLE_CPU_FEATURES", names)


def _usage() -> str:
    width = max(len(command.name) for command in COMMANDS)
    lines = [f"  {command.name:{width}}  {command.sentence}" for command in COMMANDS]
    return "\n".join(
        [
            "usage: mergemem COMMAND ...",
            "",
            "Share equal memory pages of running processes, copy-on-write.",
            "",
            *lines,
            "",
            "mergemem COMMAND --help tells more.",
        ]
    )
