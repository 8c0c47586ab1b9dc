# SPDX-License-Identifier: MIT
"""Where hints come from when there can be none, and how sampling follows the rate of faults."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergemem_agent import hint_program
from mergemem_agent.hint import SourceKind
from mergemem_agent.hint_program import HintProgram, NoProgram
from mergemem_agent.hint_source import (
    DEFAULT_SAMPLING,
    MAX_SAMPLING,
    SAMPLED_PER_SECOND,
    next_sampling,
    open_hints,
)


def refuse() -> HintProgram:
    raise NoProgram("the kernel says no", "ask another one")


@pytest.mark.parametrize(
    ("wanted", "said"), [(False, "switched off"), (True, "the kernel says no (ask another one)")]
)
def test_without_a_program_it_is_said_once(
    caplog: pytest.LogCaptureFixture, wanted: bool, said: str
) -> None:
    with caplog.at_level(logging.INFO):
        source = open_hints(wanted, refuse)
    assert len(caplog.messages) == 1
    assert said in caplog.messages[0]
    assert source.events() is None
    assert source.hints([]) == []
    assert not source.has_hints()
    assert source.state().source is SourceKind.PROC
    source.close()


def test_the_c_files_are_found() -> None:
    assert (hint_program.source_directory() / "sample.h").exists()


@given(rate=st.floats(0, 1e9), sampling=st.integers(0, 10).map(lambda power: 1 << power))
def test_what_is_counted_is_bounded(rate: float, sampling: int) -> None:
    chosen = next_sampling(sampling, rate)
    assert chosen & (chosen - 1) == 0
    assert 1 <= chosen <= MAX_SAMPLING
    assert chosen == MAX_SAMPLING or rate / chosen <= SAMPLED_PER_SECOND
    assert chosen >= sampling // 2


def test_a_quiet_host_is_counted_exactly() -> None:
    sampling = DEFAULT_SAMPLING
    for _ in range(20):
        sampling = next_sampling(sampling, SAMPLED_PER_SECOND / 2)
    assert sampling == 1
