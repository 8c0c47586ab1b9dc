# SPDX-License-Identifier: MIT
"""The table of supported kernels, and what is made from it."""

from __future__ import annotations

import pytest

from tests.vm import kernels, suite, tree
from tests.vm.cache import CHECKOUT
from tests.vm.steps import StepFailed

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
    table = kernels.parse(entry("7.x") + entry("7.10") + entry("8.0") + entry("6.12"))
    assert [kernel.name for kernel in table] == ["6.12", "7.10", "7.x", "8.0"]


@pytest.mark.parametrize(
    ("name", "version", "is_it"),
    [
        ("6.1", "6.1.192-2", True),
        ("6.1", "6.12.95-1~bpo12+1", False),
        ("7.x", "7.3.4-1~bpo13+1", True),
        ("7.x", "7.10.1-1", True),
        ("7.x", "8.0.1-1", False),
        ("7.x", "70.1-1", False),
    ],
)
def test_a_name_stands_for_a_series(name: str, version: str, is_it: bool) -> None:
    (kernel,) = kernels.parse(entry(name))
    assert kernel.is_version(version) == is_it


def test_an_archive_that_moved_on_is_not_taken_for_the_series() -> None:
    (kernel,) = kernels.parse(entry("7.x"))
    tree._check_series(kernel, {"linux-image-amd64": "7.4.1-1"})
    with pytest.raises(StepFailed, match=r"suite now have 8\.0\.1-1, which is no 7\.x"):
        tree._check_series(kernel, {"linux-image-amd64": "8.0.1-1"})


def test_skips_that_a_kernel_accounts_for() -> None:
    skips = """skips = [
        { tests = "test_huge.py::test_mthp*", reason = "no other sizes" },
        { tests = "test_kvm.py::*", reason = "no KVM" },
    ]"""
    (kernel,) = kernels.parse(entry("6.1") + skips)
    fine = [
        kernels.Skip("test_huge.py::test_mthp[64]", "no other sizes"),
        kernels.Skip("test_kvm.py::test_any", "no KVM"),
    ]
    assert suite.unaccounted(fine, kernel.skips) == ""
    for odd in (
        kernels.Skip("test_huge.py::test_other", "no other sizes"),
        kernels.Skip("test_huge.py::test_mthp[64]", "no KVM"),
        kernels.Skip("test_kvm.py::test_any", "no KVM today"),
    ):
        complaint = suite.unaccounted([*fine, odd], kernel.skips)
        assert f"{odd.tests} ({odd.reason})" in complaint
        assert complaint.count("::") == 1, "the others are fine"


def test_nothing_is_skipped_where_nothing_is_listed() -> None:
    (kernel,) = kernels.parse(entry("6.1"))
    assert kernel.skips == ()
    assert suite.unaccounted([], ()) == ""
    assert "test_a.py::test_b" in suite.unaccounted([kernels.Skip("test_a.py::test_b", "x")], ())


def test_each_stage_has_the_skips_of_its_kernel() -> None:
    assert suite.accepted_skips("unit-newest") == kernels.unit_skips() != ()
    for kernel in kernels.load():
        assert suite.accepted_skips(f"kernel-{kernel.name}") == kernel.skips
    assert suite.accepted_skips("lint") == ()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no kernel"),
        (entry("6.1") + entry("6.1"), "twice"),
        (entry("six"), "version"),
        (entry("6.1", toolchain="abacus"), "toolchain"),
        (entry("6.1") + 'colour = "red"', "colour"),
        ('[[kernel]]\nname = "6.1"', "suites"),
        (entry("x"), "version"),
        (entry("6.x.1"), "version"),
        (entry("6.1") + 'skips = ["no KVM"]', "6.1: a skip has reason and tests"),
        (entry("6.1") + 'skips = [{ tests = "*", reason = "" }]', "a skip has"),
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
