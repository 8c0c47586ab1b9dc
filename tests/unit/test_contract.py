# SPDX-License-Identifier: MIT
"""contract.py says what kmod/uapi/mergemem.h says: the compiler is asked, value by value."""

import enum
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergemem_agent import contract

UAPI = Path(__file__).parents[2] / "kmod/uapi"
HEADER = (UAPI / "mergemem.h").read_text(encoding="utf-8")

ENUMS: dict[str, tuple[type[enum.IntEnum] | type[enum.IntFlag], str]] = {
    "mergemem_command": (contract.Command, "MERGEMEM_CMD_"),
    "mergemem_attribute": (contract.Attribute, "MERGEMEM_A_"),
    "mergemem_feature": (contract.Feature, "MERGEMEM_FEATURE_"),
    "mergemem_merge_flag": (contract.MergeFlag, "MERGEMEM_MERGE_"),
    "mergemem_process_flag": (contract.ProcessFlag, "MERGEMEM_PROCESS_"),
    "mergemem_state": (contract.State, "MERGEMEM_STATE_"),
    "mergemem_result": (contract.Result, "MERGEMEM_"),
}
STRUCTURES: dict[str, np.dtype[Any]] = {
    "mergemem_process": contract.PROCESS,
    "mergemem_candidate": contract.CANDIDATE,
    "mergemem_record": contract.RECORD,
    "mergemem_limits": contract.LIMITS,
    "mergemem_counters": contract.COUNTERS,
    "mergemem_totals": contract.TOTALS,
}
CONSTANTS = {
    "MERGEMEM_CONTRACT_VERSION": contract.CONTRACT_VERSION,
    "MERGEMEM_MAX_PROCESSES": contract.MAX_PROCESSES,
    "MERGEMEM_MAX_CANDIDATES": contract.MAX_CANDIDATES,
    "MERGEMEM_MAX_UNMERGE_PAGES": contract.MAX_UNMERGE_PAGES,
    "MERGEMEM_MAX_FULL_PAGES": contract.MAX_FULL_PAGES,
    "MERGEMEM_DEPTH_STEP_BYTES": contract.DEPTH_STEP_BYTES,
    "MERGEMEM_DEPTH_SAMPLE_BYTES": contract.DEPTH_SAMPLE_BYTES,
    "MERGEMEM_DEPTH_FULL_BYTES": contract.DEPTH_FULL_BYTES,
    "MERGEMEM_GROUP_ZERO": contract.GROUP_ZERO,
}


def without_comments() -> str:
    return re.sub(r"/\*.*?\*/", "", HEADER, flags=re.DOTALL)


def bodies(kind: str) -> dict[str, str]:
    """Return the text between the braces of each enum or struct that the header defines."""
    pattern = rf"^{kind} (\w+) \{{(.*?)^\}};"
    return dict(re.findall(pattern, without_comments(), flags=re.DOTALL | re.MULTILINE))


def enumerators(name: str) -> list[str]:
    """Return the names of an enum's values, without those that only count them."""
    found = re.findall(r"^\s*(\w+)", bodies("enum")[name], flags=re.MULTILINE)
    return [value for value in found if not value.startswith("__")]


def fields(name: str) -> list[str]:
    return re.findall(r"__u\d+\s+(\w+)", bodies("struct")[name])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Return what the compiler makes of each expression that the tests ask for."""
    expressions = list(CONSTANTS)
    expressions += [value for name in ENUMS for value in enumerators(name)]
    for name in STRUCTURES:
        expressions.append(f"sizeof(struct {name})")
        for field in fields(name):
            expressions.append(f"offsetof(struct {name}, {field})")
            expressions.append(f"sizeof(((struct {name} *)0)->{field})")
    lines = [f'printf("%ld\\n", (long)({expression}));' for expression in expressions]
    directory = tmp_path_factory.mktemp("contract")
    source = directory / "contract.c"
    source.write_text(
        '#include <stddef.h>\n#include <stdio.h>\n#include "mergemem.h"\n'
        "int main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n"
    )
    program = directory / "contract"
    subprocess.run(["gcc", "-Wall", "-Werror", f"-I{UAPI}", source, "-o", program], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return dict(zip(expressions, map(int, output.split()), strict=True))


def test_every_enum_and_structure_of_the_header_is_known() -> None:
    assert set(bodies("enum")) == set(ENUMS)
    assert set(bodies("struct")) == set(STRUCTURES)


@pytest.mark.parametrize("name", ENUMS)
def test_enum(name: str, compiled: dict[str, int]) -> None:
    known, prefix = ENUMS[name]
    expected = {value.removeprefix(prefix): compiled[value] for value in enumerators(name)}
    assert {member.name: member.value for member in known} == expected


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure(name: str, compiled: dict[str, int]) -> None:
    dtype = STRUCTURES[name]
    assert dtype.itemsize == compiled[f"sizeof(struct {name})"]
    assert list(dtype.names or ()) == fields(name)
    for field, (kind, offset, *_) in (dtype.fields or {}).items():
        assert offset == compiled[f"offsetof(struct {name}, {field})"], field
        assert kind.itemsize == compiled[f"sizeof(((struct {name} *)0)->{field})"], field


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant(name: str, compiled: dict[str, int]) -> None:
    assert CONSTANTS[name] == compiled[name]


def test_family_name() -> None:
    assert f'"{contract.FAMILY_NAME}"' in HEADER
