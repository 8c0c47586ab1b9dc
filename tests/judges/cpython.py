# SPDX-License-Identifier: MIT
"""CPython's own test-suite: reference counts, a garbage collector, forks and threads."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.judges import provision
from tests.judges.judge import Judge
from tests.judges.place import NotRun, Place, Wrong

# The one whose test-suite is packaged, and of the very version.
PYTHON = "/usr/bin/python3.11"
VERSION = "python3.11"
FAILED = re.compile(r"^(?:FAIL|ERROR): .*$|^test_\w+ (?:failed|crashed).*$", re.MULTILINE)
RAN = re.compile(r"^Ran (\d+) tests? in", re.MULTILINE)
TOLD_CHARACTERS = 1500


# Its files come in two packages, one of them unpacked elsewhere: one package "test" of both.
PROGRAM = """
import sys, test, unittest
test.__path__.append(sys.argv[1])
unittest.main(module=None, argv=["unittest", *sys.argv[2:]])
"""


@dataclass(frozen=True)
class TestSuite:
    """Test files of the suite, again and again until the time is up, two side by side."""

    tests: tuple[str, ...]

    def __call__(self, place: Place) -> None:
        library = provision.root() / "usr/lib" / VERSION / "test"
        words = [PYTHON, "-c", PROGRAM, str(library), *(f"test.{name}" for name in self.tests)]
        first = True
        while first or place.time_left > 0:
            programs = [
                place.start(*words, env={"PYTHONHASHSEED": "0"}, same_addresses=True)
                for _ in range(2)
            ]
            for program in programs:
                _judge(place.finish(program))
            first = False


def _judge(output: str) -> None:
    ran = RAN.search(output)
    if failures := FAILED.findall(output):
        raise Wrong("\n".join([*failures, output[-TOLD_CHARACTERS:]]), len(failures))
    if not ran or not int(ran[1]):
        raise NotRun(output[-TOLD_CHARACTERS:])


JUDGES = (
    Judge(
        "cpython-gc",
        "CPython's tests of its garbage collector and weak sets",
        TestSuite(("test_gc", "test_weakset")),
        100,
        20,
    ),
    Judge(
        "cpython-objects",
        "CPython's tests of dicts, lists, generators and copies",
        TestSuite(("test_dict", "test_list", "test_generators", "test_copy")),
        100,
        20,
    ),
    Judge(
        "cpython-fork",
        "CPython's tests of fork, with threads and without",
        TestSuite(("test_fork1", "test_thread")),
        100,
        20,
    ),
)
