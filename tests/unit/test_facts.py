# SPDX-License-Identifier: MIT
"""kmod/facts.sh: which probes of a file compile. It needs a compiler, but no kernel."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

KMOD = Path(__file__).resolve().parents[2] / "kmod"
MACROS = """\
#define FACT(name, ...) void probe_##name(void) { __VA_ARGS__; }
#define FUNCTION(name, function, ...) FACT(name, \\
	_Static_assert(__builtin_types_compatible_p(typeof(function), __VA_ARGS__), ""))
#define NEEDED(function, ...) FUNCTION(needed_##function, function, __VA_ARGS__)
int one(int argument);
void two(void);
"""
CONTROLS = """
FACT(must_succeed, two())
FACT(must_fail, no_such_function())
"""
PROBES = """
FUNCTION(ONE, one, int (int))
FUNCTION(ONE_OF_LONG, one,
         int (long))
FUNCTION(THREE, three, void (void))
FACT(CALLS, struct { int field; } x = {
        .field = one(1),
     }; (void)x.field)
FACT(MEMBER,
     struct { int field; } x;
     (void)x.other)
FUNCTION(TWO, two, void (void))
"""


def facts(directory: Path, text: str) -> subprocess.CompletedProcess[str]:
    source, output = directory / "facts.c", directory / "facts.h"
    source.write_text(text)
    flags = ["-ftrack-macro-expansion=0", "-Werror=implicit-function-declaration"]
    return subprocess.run(
        ["sh", KMOD / "facts.sh", output, source, "gcc", *flags], capture_output=True, text=True
    )


def found(directory: Path) -> set[str]:
    text = (directory / "facts.h").read_text()
    return set(re.findall(r"^#define MERGEMEM_HAVE_(\w+) 1$", text, re.M))


def test_each_probe_stands_alone(tmp_path: Path) -> None:
    done = facts(tmp_path, MACROS + CONTROLS + PROBES)
    assert done.returncode == 0, done.stderr
    assert found(tmp_path) == {"ONE", "CALLS", "TWO"}
    assert "#error" not in (tmp_path / "facts.h").read_text()


def test_what_is_needed_is_an_error_with_its_name_and_type(tmp_path: Path) -> None:
    needs = "\n".join(
        ["NEEDED(two, void (void))", "NEEDED(three,", "       long (void *, int))", ""]
    )
    assert facts(tmp_path, MACROS + CONTROLS + needs).returncode == 0
    (error,) = re.findall("^#error .*$", (tmp_path / "facts.h").read_text(), re.M)
    assert error.endswith("no function three() was found; tried: NEEDED(three, long (void *, int))")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (MACROS + CONTROLS.replace("two()", "five()") + PROBES, "the probe must_succeed did not"),
        (MACROS + CONTROLS.replace("no_such_function", "two") + PROBES, "the probe must_fail did"),
        ('#include "no-such-header.h"\n' + MACROS + CONTROLS + PROBES, "no-such-header.h: No such"),
        (MACROS + "int one(long);\n" + CONTROLS + PROBES, "conflicting types"),
    ],
)
def test_doubts_are_no_facts(tmp_path: Path, text: str, complaint: str) -> None:
    done = facts(tmp_path, text)
    assert done.returncode == 1
    assert "cannot find out about this kernel" in done.stderr
    assert complaint in done.stderr
    assert not (tmp_path / "facts.h").exists()


def test_every_fact_is_used_by_compat_alone() -> None:
    asked = re.findall(r"^(?:FACT|FUNCTION)\((\w+)", (KMOD / "facts.c").read_text(), re.M)
    assert len(set(asked)) == len(asked)
    for path in sorted(KMOD.rglob("*.[ch]")):
        used = set(re.findall(r"MERGEMEM_HAVE_(\w+)", path.read_text()))
        if path.name == "compat.h":
            assert used == set(asked) - {"must_succeed", "must_fail"}
        elif path.name not in ("facts.c", "facts.h"):
            assert not used, path.name
        assert "LINUX_VERSION_CODE" not in path.read_text(), path.name
