# SPDX-License-Identifier: MIT
"""The debug kernel: offered by name, and configured as its fragment says or not at all."""

from __future__ import annotations

from tests.vm import debug_kernel, kernels


def test_it_is_offered_by_name_only() -> None:
    assert kernels.debug().name == "debug"
    assert kernels.debug() not in kernels.load()
    assert kernels.select(kernels.load(), "debug") == (kernels.debug(),)
    assert kernels.find("debug") == kernels.debug()
    assert kernels.find("newest") != kernels.debug()


def test_a_setting_that_kconfig_dropped_is_named() -> None:
    wanted = "# why\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=m\n"
    assert debug_kernel.unmet(wanted, "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=m\n") == []
    assert debug_kernel.unmet(wanted, "# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_C=m\n") == [
        "CONFIG_A=y",
        "# CONFIG_B is not set",
    ]


def test_no_setting_is_named_twice() -> None:
    lines = debug_kernel.CONFIG.read_text(encoding="utf-8").splitlines()
    names = [line.split("=")[0] for line in lines if line.startswith("CONFIG_")]
    assert len(names) == len(set(names))
