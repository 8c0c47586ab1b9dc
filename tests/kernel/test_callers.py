# SPDX-License-Identifier: MIT
"""Who may talk to the module: CAP_SYS_PTRACE in the initial user namespace, and nobody else.

Asked of the opener of a socket and of whoever uses it, for every command, even about the caller's
own memory.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable

import pytest

from tests.kernel import frames
from tests.kernel.actor import Region, Stage
from tests.kernel.wire import Client, Refused

SEED = 55
PTRACE_CAPABILITY, ADMIN_CAPABILITY = 19, 21


def in_child(action: Callable[[], None]) -> int:
    """The errno with which an action fails in a child process; 0 when it succeeds."""
    child = os.fork()
    if not child:
        status = 255
        try:
            action()
            status = 0
        except OSError as failed:
            status = failed.errno or 254
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def everything(client: Client, region: Region) -> None:
    """Each command works; or each is refused, and explained, and that is raised."""
    commands: list[Callable[[], object]] = [
        client.info,
        lambda: client.checksum(region.actor.key, region.address, 1),
        lambda: client.unmerge(region.actor.key, region.address, 1),
        lambda: client.merge([region[0], region[1]]),
    ]
    refusals = [refused for command in commands if (refused := refusal(command))]
    if not refusals:
        return
    if len(refusals) < len(commands):
        raise OSError(253, "some were refused, some not")
    if not all("CAP_SYS_PTRACE" in refused.text for refused in refusals):
        raise OSError(252, "a refusal without an explanation")
    raise refusals[0]


def refusal(command: Callable[[], object]) -> Refused | None:
    """The refusal with which a command ends, if it does."""
    try:
        command()
    except Refused as refused:
        return refused
    return None


@pytest.fixture
def own_pages(stage: Stage) -> Region:
    """Pages of the unprivileged user itself."""
    return stage.start(uid=1001).region(2, SEED, period=1)


def test_unprivileged_caller(client: Client, own_pages: Region) -> None:
    def call() -> None:
        os.setresuid(1001, 1001, 1001)
        with Client() as unprivileged:
            everything(unprivileged, own_pages)

    assert in_child(call) == errno.EPERM
    frames.assert_distinct(own_pages)


def test_privileged_socket_in_unprivileged_hands(client: Client, own_pages: Region) -> None:
    def call() -> None:
        os.setresuid(1001, 1001, 1001)
        everything(client, own_pages)

    assert client.family
    assert in_child(call) == errno.EPERM
    frames.assert_distinct(own_pages)


def test_root_of_a_user_namespace(client: Client, own_pages: Region) -> None:
    """All capabilities, but not in the initial namespace."""

    def call() -> None:
        if ctypes.CDLL(None).unshare(0x10000000):
            os._exit(250)
        with Client() as root_of_nothing:
            everything(root_of_nothing, own_pages)

    assert in_child(call) == errno.EPERM
    frames.assert_distinct(own_pages)


@pytest.mark.parametrize(
    ("capability", "status"), [(PTRACE_CAPABILITY, 0), (ADMIN_CAPABILITY, errno.EPERM)]
)
def test_the_one_capability(
    client: Client, own_pages: Region, capability: int, status: int
) -> None:
    """CAP_SYS_PTRACE is enough; CAP_SYS_ADMIN is no substitute."""

    def call() -> None:
        keep_only(capability)
        with Client() as caller:
            everything(caller, own_pages)

    assert in_child(call) == status
    if status:
        frames.assert_distinct(own_pages)
    else:
        frames.assert_shared(own_pages)


def keep_only(capability: int) -> None:
    """Become an ordinary user with one capability."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setresuid(1001, 1001, 1001)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    mask = 1 << capability
    sets = (ctypes.c_uint32 * 6)(mask, mask, 0, 0, 0, 0)
    if libc.capset(header, sets):
        os._exit(251)
