# SPDX-License-Identifier: MIT
"""The scene of every test: the module is loaded, and nothing may be left of it at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.actor import Stage
from tests.kernel.kernel_log import KernelLog
from tests.kernel.module import Module
from tests.kernel.sharing import Merged, merge_all
from tests.kernel.wire import Client

# The control directory that the rig mounts into its guests, and nobody else has.
IN_GUEST = Path("/run/vm/settings")


@pytest.fixture(scope="session")
def module() -> Iterator[Module]:
    """The module, loaded without parameters."""
    # Never on a machine that somebody needs.
    if not IN_GUEST.exists() or "MERGEMEM_KO" not in os.environ:
        pytest.fail("these tests load a kernel module; run them with: make test-vm", pytrace=False)
    # What is huge is so because a test asked for it.
    Path("/sys/kernel/mm/transparent_hugepage/enabled").write_text("madvise")
    module = Module()
    module.reload()
    yield module
    if module.loaded:
        module.unload()


@pytest.fixture
def client(module: Module) -> Iterator[Client]:
    """A connection to the module."""
    if not module.loaded:
        module.load()
    with Client() as client:
        yield client


@pytest.fixture
def stage() -> Iterator[Stage]:
    """Where actors come from; all have gone at the end of the test."""
    with Stage() as stage:
        yield stage


@pytest.fixture(autouse=True)
def scene(module: Module) -> Iterator[None]:
    """Around everything else: no complaint in the kernel log, no shared page left over.

    Tests end their actors, and with the last mapping of a shared page it must have been freed.
    """
    log = KernelLog()
    yield
    if not module.loaded:
        module.load()
    with Client() as client:
        info = client.info()
    complaints = log.complaints()
    log.close()
    assert not complaints, "\n".join(log.lines)
    assert (info.shared_pages, info.shared_mappings) == (0, 0)


@pytest.fixture
def merged(stage: Stage, client: Client) -> Merged:
    """Eight pages each, equal, and merged."""
    alice, bob = (stage.start().region(Merged.PAGES, Merged.SEED) for _ in range(2))
    merge_all(client, alice, bob)
    return Merged(alice, bob, [int(frame) for frame in alice.frames])


@pytest.fixture
def totals(client: Client) -> Iterator[list[int]]:
    """What INFO must say at the end: [shared pages, mappings], set by the test's last line."""
    expected: list[int] = []
    yield expected
    info = client.info()
    if expected:
        assert [info.shared_pages, info.shared_mappings] == expected
