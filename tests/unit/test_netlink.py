# SPDX-License-Identifier: MIT
"""The netlink socket against the one family that every kernel has: nlctrl."""

import errno
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from pyroute2.netlink import CTRL_CMD_GETFAMILY, ctrlmsg

from mergemem_agent import module
from mergemem_agent.contract import RECORD, Attribute
from mergemem_agent.module import Module, ModuleMissing
from mergemem_agent.netlink import FamilyMissing, GenericNetlink, NetlinkFailure

NAME = "CTRL_ATTR_FAMILY_NAME"
UNKNOWN_COMMAND = 77


@pytest.fixture
def control():  # type: ignore[no-untyped-def]
    with GenericNetlink("nlctrl", 2, ctrlmsg) as opened:
        yield opened


def test_do_returns_the_reply(control: GenericNetlink) -> None:
    reply = control.do(CTRL_CMD_GETFAMILY, [(NAME, "nlctrl")])
    assert reply is not None
    assert reply.get_attr(NAME) == "nlctrl"


def test_dump_returns_all_parts(control: GenericNetlink) -> None:
    names = {reply.get_attr(NAME) for reply in control.dump(CTRL_CMD_GETFAMILY)}
    assert "nlctrl" in names
    assert len(names) > 3


def test_an_error_has_its_number(control: GenericNetlink) -> None:
    with pytest.raises(NetlinkFailure) as failure:
        control.do(UNKNOWN_COMMAND)
    assert failure.value.code == errno.EOPNOTSUPP
    assert failure.value.text == ""
    assert failure.value.message == os.strerror(errno.EOPNOTSUPP)


def test_an_error_has_the_kernels_words(control: GenericNetlink) -> None:
    too_long = "x" * 500
    with pytest.raises(NetlinkFailure) as failure:
        control.do(CTRL_CMD_GETFAMILY, [(NAME, too_long)])
    assert failure.value.code == errno.EINVAL
    assert "policy validation" in failure.value.text


def test_the_kernels_words_survive_a_large_request(control: GenericNetlink) -> None:
    # Without NETLINK_CAP_ACK the answer would echo 65,000 bytes before it says what was wrong.
    with pytest.raises(NetlinkFailure) as failure:
        control.do(CTRL_CMD_GETFAMILY, [(NAME, "x" * 65000)])
    assert "policy validation" in failure.value.text


def test_the_socket_goes_on_after_an_error(control: GenericNetlink) -> None:
    with pytest.raises(NetlinkFailure):
        control.do(UNKNOWN_COMMAND)
    with pytest.raises(NetlinkFailure):
        control.dump(UNKNOWN_COMMAND)
    assert control.do(CTRL_CMD_GETFAMILY, [(NAME, "nlctrl")]) is not None


def test_a_missing_family_is_told() -> None:
    with pytest.raises(FamilyMissing, match="no-such-family"):
        GenericNetlink("no-such-family", 1, ctrlmsg)


def test_no_descriptor_is_left_open() -> None:
    def talk() -> None:
        with GenericNetlink("nlctrl", 2, ctrlmsg) as control:
            control.dump(CTRL_CMD_GETFAMILY)
        with pytest.raises(FamilyMissing):
            GenericNetlink("no-such-family", 1, ctrlmsg)

    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        thread = threading.Thread(target=talk)
        thread.start()
        thread.join()
    assert len(os.listdir("/proc/self/fd")) == before


def test_messages_name_every_attribute_in_its_place() -> None:
    assert [name for name, _ in module._Message.nla_map] == [entry.name for entry in Attribute]


def test_records_are_a_view_of_what_was_received() -> None:
    records = np.zeros(5, dtype=RECORD)
    records["checksum"] = [1, 2, 3, 4, 2**64 - 1]
    attribute = struct.pack("HH", 4 + records.nbytes, Attribute.RECORDS) + records.tobytes()
    address = struct.pack("=HHQ", 12, Attribute.ADDRESS, 0x7F00_0000_1000)
    body = struct.pack("BBH", 2, 1, 0) + address + attribute
    message = module._Message(struct.pack("IHHII", 16 + len(body), 40, 2, 1, 0) + body)
    message.decode()
    run = module._run(message)
    assert (run.address, run.refused_pages) == (0x7F00_0000_1000, 0)
    assert run.records.tolist() == records.tolist()
    assert not run.records.flags.owndata


def test_a_module_that_is_not_loaded_is_told_with_what_to_do() -> None:
    if Path("/sys/module/mergemem").exists():
        with Module() as loaded:
            assert loaded.info().contract_version
        return
    with pytest.raises(ModuleMissing) as failure:
        Module()
    assert "modprobe mergemem" in failure.value.hint
