# SPDX-License-Identifier: MIT
"""The table of supported kernels, and what is made from it."""

from __future__ import annotations

import pytest

from tests.vm import kernels
from tests.vm.cache import CHECKOUT

ENTRY = """
[[kernel]]
name = "{name}"
release = "Debian"
suites = ["suite"]
packages = ["linux-image-amd64"]
toolchain = "{toolchain}"
boot = "vmlinux"
"""


def entry(name: str, toolchain: str = "host") -> str:
    return ENTRY.format(name=name, toolchain=toolchain)


def test_the_table_is_sorted_by_version_not_by_text() -> None:
    table = kernels.parse(entry("6.12") + entry("6.1") + entry("6.2"))
    assert [kernel.name for kernel in table] == ["6.1", "6.2", "6.12"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no kernel"),
        (entry("6.1") + entry("6.1"), "twice"),
        (entry("six"), "version"),
        (entry("6.1", toolchain="abacus"), "toolchain"),
        (entry("6.1") + 'colour = "red"', "colour"),
        ('[[kernel]]\nname = "6.1"', "suites"),
    ],
)
def test_a_wrong_table_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(kernels.TableError, match=complaint):
        kernels.parse(text)


def test_selection() -> None:
    table = kernels.parse(entry("6.1") + entry("6.12"))
    assert kernels.select(table, None) == table
    assert kernels.select(table, "") == table
    assert kernels.select(table, "6.12") == table[1:]
    assert kernels.select(table, "6.12,6.1") == (table[1], table[0])
    with pytest.raises(kernels.TableError, match=r"6\.3.*there are 6\.1, 6\.12"):
        kernels.select(table, "6.3")


def test_newest() -> None:
    assert kernels.find("newest") == kernels.load()[-1]


def test_the_readme_has_this_table() -> None:
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    assert kernels.markdown(kernels.load()) in readme, "see python3 -m tests.vm.kernels --markdown"
