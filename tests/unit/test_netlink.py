# SPDX-License-Identifier: MIT
"""The netlink socket against the one family that every kernel has, nlctrl, and against bytes.

What nlctrl never does is played by a socket whose answers are written here, by the numbers of
linux/netlink.h and with no help of the client.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from mergemem_agent import contract, module
from mergemem_agent.contract import CANDIDATE, COUNTERS, LIMITS, RECORD, Attribute, Command
from mergemem_agent.error import MergememError
from mergemem_agent.module import ContractMismatch, Module, ModuleMissing
from mergemem_agent.netlink import (
    ANSWER_SECONDS,
    CTRL_ATTR_FAMILY_NAME,
    CTRL_CMD_GETFAMILY,
    NETLINK_GENERIC,
    RECEIVE_BYTES,
    FamilyMissing,
    GenericNetlink,
    NetlinkFailure,
    attributes_of,
    messages_of,
    payload_of,
    text_of,
)
from mergemem_agent.procfs import ProcessId

UNKNOWN_COMMAND = 77
NLCTRL = (CTRL_ATTR_FAMILY_NAME, b"nlctrl\0")

FAMILY = 40
ERROR, DONE = 2, 3
MULTI, TEXT = 0x2, 0x200
PROCESS = ProcessId(pid=1234, start_time_ticks=5678)
ADDRESS = 0x7F00_0000_1000


@pytest.fixture
def control() -> Iterator[GenericNetlink]:
    with GenericNetlink("nlctrl", 2) as opened:
        yield opened


# --- the running kernel --------------------------------------------------------------------------


def test_do_returns_the_reply(control: GenericNetlink) -> None:
    reply = control.do(CTRL_CMD_GETFAMILY, [NLCTRL])
    assert reply is not None
    assert text_of(reply.get(CTRL_ATTR_FAMILY_NAME)) == "nlctrl"
    assert reply.get(12345) is None


def test_dump_returns_all_parts(control: GenericNetlink) -> None:
    replies = control.dump(CTRL_CMD_GETFAMILY)
    names = {text_of(reply.get(CTRL_ATTR_FAMILY_NAME)) for reply in replies}
    assert "nlctrl" in names
    assert len(names) > 3


def test_an_error_has_its_number(control: GenericNetlink) -> None:
    with pytest.raises(NetlinkFailure) as failure:
        control.do(UNKNOWN_COMMAND)
    assert failure.value.code == errno.EOPNOTSUPP
    assert failure.value.text == ""
    assert failure.value.message == os.strerror(errno.EOPNOTSUPP)


def test_an_error_has_the_kernels_words(control: GenericNetlink) -> None:
    too_long = b"x" * 500 + b"\0"
    with pytest.raises(NetlinkFailure) as failure:
        control.do(CTRL_CMD_GETFAMILY, [(CTRL_ATTR_FAMILY_NAME, too_long)])
    assert failure.value.code == errno.EINVAL
    assert "policy validation" in failure.value.text
    assert failure.value.message == failure.value.text


def test_the_kernels_words_survive_a_large_request(control: GenericNetlink) -> None:
    # Without NETLINK_CAP_ACK the answer would echo 65,000 bytes before it says what was wrong.
    with pytest.raises(NetlinkFailure) as failure:
        control.do(CTRL_CMD_GETFAMILY, [(CTRL_ATTR_FAMILY_NAME, b"x" * 65000)])
    assert "policy validation" in failure.value.text


def test_the_socket_goes_on_after_an_error(control: GenericNetlink) -> None:
    with pytest.raises(NetlinkFailure):
        control.do(UNKNOWN_COMMAND)
    with pytest.raises(NetlinkFailure):
        control.dump(UNKNOWN_COMMAND)
    assert control.do(CTRL_CMD_GETFAMILY, [NLCTRL]) is not None


def test_the_socket_goes_on_after_a_request_was_given_up(control: GenericNetlink) -> None:
    class GivenUp(Exception):
        pass

    def give_up(*_: object) -> None:
        raise GivenUp

    control._receive = give_up  # type: ignore[method-assign,assignment]
    with pytest.raises(GivenUp):
        control.do(CTRL_CMD_GETFAMILY, [(CTRL_ATTR_FAMILY_NAME, b"no-such-family\0")])
    del control._receive
    reply = control.do(CTRL_CMD_GETFAMILY, [NLCTRL])
    assert reply is not None
    assert text_of(reply.get(CTRL_ATTR_FAMILY_NAME)) == "nlctrl"


def test_only_the_kernel_can_answer(control: GenericNetlink) -> None:
    # Without CAP_NET_ADMIN nobody sends anything to another socket anyway: EPERM.
    with (
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC) as stranger,
        pytest.raises((ConnectionRefusedError, PermissionError)),
    ):
        stranger.sendto(message(1), control._socket.getsockname())


def test_a_missing_family_is_told() -> None:
    with pytest.raises(FamilyMissing, match="no-such-family"):
        GenericNetlink("no-such-family", 1)


def test_no_descriptor_is_left_open() -> None:
    def talk() -> None:
        with GenericNetlink("nlctrl", 2) as control:
            control.dump(CTRL_CMD_GETFAMILY)
        with pytest.raises(FamilyMissing):
            GenericNetlink("no-such-family", 1)

    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        thread = threading.Thread(target=talk)
        thread.start()
        thread.join()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_module_that_is_not_loaded_is_told_with_what_to_do() -> None:
    if Path("/sys/module/mergemem").exists():
        with Module() as loaded:
            assert loaded.info().contract_version
        return
    with pytest.raises(ModuleMissing) as failure:
        Module()
    assert "modprobe mergemem" in failure.value.hint


# --- answers that are written here ---------------------------------------------------------------


def attribute(number: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), number) + value + bytes(-len(value) % 4)


def message(
    sequence_number: int, kind: int = FAMILY, body: bytes = b"", flags: int = MULTI
) -> bytes:
    """One message; its body is that of our family, attributes, unless it is an ERROR or DONE."""
    if kind == FAMILY:
        body = struct.pack("=BBH", 2, 1, 0) + body
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence_number, 99) + body


def verdict(sequence_number: int, kind: int, code: int = 0, text: str | None = None) -> bytes:
    """The end of an answer."""
    body = struct.pack("=i", -code)
    if kind == ERROR:  # the header of the request, which is no attribute
        body += struct.pack("=IHHII", 20, FAMILY, 5, sequence_number, 99)
    if text is not None:
        body += attribute(1, text.encode() + b"\0")
    return message(sequence_number, kind, body, MULTI | (0 if text is None else TEXT))


Answer = Callable[[int], Sequence[bytes | BaseException]]


class Kernel:
    """A socket that gives each request the next answer: datagrams, or an exception in place."""

    def __init__(self, *answers: Answer) -> None:
        self.requests: list[bytes] = []
        self.timeouts: list[float] = []
        self.flags = 0
        self.closed = False
        self._answers = iter(answers)
        self._waiting: list[bytes | BaseException] = []

    def __call__(self, *kind: int) -> Self:
        assert kind == (socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 16)
        return self

    def setsockopt(self, *option: int) -> None:
        assert option in ((270, 10, 1), (270, 11, 1))

    def settimeout(self, seconds: float) -> None:
        self.timeouts.append(seconds)

    def connect(self, address: tuple[int, int]) -> None:
        assert address == (0, 0)

    def close(self) -> None:
        self.closed = True

    def send(self, request: bytes) -> int:
        self.requests.append(request)
        (sequence_number,) = struct.unpack_from("=I", request, 8)
        self._waiting += next(self._answers)(sequence_number)
        return len(request)

    def recvmsg(self, size: int) -> tuple[bytes, list[Any], int, tuple[int, int]]:
        assert size == RECEIVE_BYTES
        next_one = self._waiting.pop(0)
        if isinstance(next_one, BaseException):
            raise next_one
        return next_one, [], self.flags, (0, 0)


def family(number: int) -> list[bytes]:
    """What the first request is for."""
    found = attribute(2, b"played\0") + attribute(1, struct.pack("=H", FAMILY))
    return [message(number, body=found), verdict(number, ERROR)]


Play = Callable[..., Kernel]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    def with_answers(*answers: Answer, first: Answer = family) -> Kernel:
        kernel = Kernel(first, *answers)
        monkeypatch.setattr("mergemem_agent.netlink.socket.socket", kernel)
        return kernel

    return with_answers


def numbers(replies: Sequence[Any]) -> list[bytes]:
    return [bytes(reply.get(7)) for reply in replies]


def test_a_request_is_encoded_as_the_kernel_reads_it(play: Play) -> None:
    kernel = play(lambda number: [verdict(number, ERROR)], lambda number: [verdict(number, DONE)])
    netlink = GenericNetlink("played", 3)
    assert netlink.do(5, [(7, b"abcde"), (8, b"")]) is None
    assert netlink.dump(6) == []
    body = struct.pack("=BBH", 5, 3, 0) + attribute(7, b"abcde") + attribute(8, b"")
    assert kernel.requests == [
        struct.pack("=IHHIIBBH", 32, 16, 0x5, 1, 0, 3, 2, 0) + attribute(2, b"played\0"),
        struct.pack("=IHHII", 16 + 20, FAMILY, 0x5, 2, 0) + body,
        struct.pack("=IHHIIBBH", 20, FAMILY, 0x301, 3, 0, 6, 3, 0),
    ]


def test_an_attribute_that_is_too_long_is_not_sent(play: Play) -> None:
    kernel = play()
    netlink = GenericNetlink("played", 3)
    with pytest.raises(struct.error):
        netlink.do(5, [(7, bytes(65532))])
    assert len(kernel.requests) == 1


def test_several_messages_come_in_one_datagram(play: Play) -> None:
    def answer(number: int) -> list[bytes]:
        values = [message(number, body=attribute(7, b"x" * length)) for length in (1, 2, 3, 4, 5)]
        values[0] = values[0][:-3]  # the end of a message need not be filled up: its place is
        values[0] = struct.pack("=I", len(values[0])) + values[0][4:] + bytes(3)
        return [b"".join(values[:3]), values[3], values[4] + verdict(number, DONE)]

    play(answer)
    replies = GenericNetlink("played", 3).dump(5)
    assert numbers(replies) == [b"x", b"xx", b"xxx", b"xxxx", b"xxxxx"]


def test_nothing_that_follows_the_end_is_taken(play: Play) -> None:
    play(lambda number: [message(number) + verdict(number, DONE) + message(number)])
    assert len(GenericNetlink("played", 3).dump(5)) == 1


def test_the_rest_of_a_request_that_was_given_up_is_skipped(play: Play) -> None:
    def given_up(number: int) -> list[bytes | BaseException]:
        old, text = attribute(7, b"old!"), "of the old one"
        return [
            message(number, body=old),
            KeyboardInterrupt(),
            message(number, body=old),
            message(number, body=old) + verdict(number, DONE, errno.EBUSY, text),
        ]

    def answer(number: int) -> list[bytes]:
        return [message(number, body=attribute(7, b"new!")), verdict(number, ERROR)]

    play(given_up, answer)
    netlink = GenericNetlink("played", 3)
    with pytest.raises(KeyboardInterrupt):
        netlink.dump(5)
    reply = netlink.do(5)
    assert reply is not None
    assert numbers([reply]) == [b"new!"]


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOENT, FamilyMissing), (errno.ENOMEM, NetlinkFailure)]
)
def test_a_socket_without_a_family_is_closed(
    play: Play, code: int, kind: type[MergememError]
) -> None:
    kernel = play(first=lambda number: [verdict(number, ERROR, code)])
    with pytest.raises(kind):
        GenericNetlink("played", 3)
    assert kernel.closed


def test_sequence_numbers_start_again(play: Play) -> None:
    play(lambda number: [verdict(number, ERROR)], lambda number: [verdict(number, ERROR)])
    netlink = GenericNetlink("played", 3)
    netlink._sequence_number = 2**32 - 2
    netlink.do(5)
    netlink.do(5)
    assert netlink._sequence_number == 0


@pytest.mark.parametrize("kind", [ERROR, DONE])
@pytest.mark.parametrize("text", ["the process keeps its mmap_lock", None])
def test_an_error_ends_a_dump_half_way(play: Play, kind: int, text: str | None) -> None:
    play(lambda number: [message(number), verdict(number, kind, errno.EBUSY, text)])
    with pytest.raises(NetlinkFailure) as failure:
        GenericNetlink("played", 3).dump(5)
    assert failure.value.code == errno.EBUSY
    assert failure.value.text == (text or "")
    assert failure.value.message == (text or os.strerror(errno.EBUSY))


@pytest.mark.parametrize("kind", [ERROR, DONE])
def test_success_with_a_text_is_no_failure(play: Play, kind: int) -> None:
    play(lambda number: [message(number), verdict(number, kind, 0, "a warning")])
    assert len(GenericNetlink("played", 3).dump(5)) == 1


def test_what_follows_an_error_is_a_text_only_if_the_kernel_says_so(play: Play) -> None:
    end = struct.pack("=i", -errno.EIO) + attribute(1, b"no text\0")
    play(lambda number: [message(number, DONE, end)])
    with pytest.raises(NetlinkFailure) as failure:
        GenericNetlink("played", 3).dump(5)
    assert failure.value.text == ""


def test_a_message_that_is_cut_off_is_a_failure(play: Play) -> None:
    kernel = play(lambda number: [message(number)])
    netlink = GenericNetlink("played", 3)
    kernel.flags = socket.MSG_TRUNC
    with pytest.raises(NetlinkFailure) as failure:
        netlink.dump(5)
    assert failure.value.code == errno.EMSGSIZE


def test_a_kernel_that_does_not_answer_is_a_failure(play: Play) -> None:
    kernel = play(lambda _: [TimeoutError()])
    netlink = GenericNetlink("played", 3)
    assert kernel.timeouts == [ANSWER_SECONDS]
    with pytest.raises(NetlinkFailure, match="played") as failure:
        netlink.do(5)
    assert failure.value.code == errno.ETIMEDOUT


def test_flags_are_no_part_of_an_attributes_number() -> None:
    (number,) = attributes_of(memoryview(attribute(0x8000 | 0x4000 | 7, b"nested")))
    assert number == 7


def test_what_is_encoded_is_decoded() -> None:
    values = {number: b"v" * number for number in range(1, 12)}
    payload = payload_of(5, 3, values.items())
    whole = struct.pack("=IHHII", 16 + len(payload), FAMILY, 0, 1, 0) + payload
    ((_, _, _, received),) = messages_of(whole)
    assert {number: bytes(value) for number, value in attributes_of(received[4:]).items()} == values


# --- the module's messages -----------------------------------------------------------------------


def info(number: int) -> list[bytes]:
    """What the module says first."""
    version = attribute(Attribute.CONTRACT_VERSION, struct.pack("=I", contract.CONTRACT_VERSION))
    return [message(number, body=version), verdict(number, ERROR)]


def some_records(count: int) -> Any:
    records = np.zeros(count, dtype=RECORD)
    records["checksum"] = np.arange(count, dtype=np.uint64) + np.uint64(2**63)
    records["map_count"], records["order"] = np.arange(count), 9
    return records


def run_of(number: int, records: Any, padded: bool = False) -> bytes:
    """A message of CHECKSUM; `padded`: with PAD, as where 64-bit numbers must be aligned."""
    address = attribute(Attribute.ADDRESS, struct.pack("=Q", ADDRESS))
    pad = attribute(Attribute.PAD, b"") if padded else b""
    return message(
        number, body=pad + address + pad + attribute(Attribute.RECORDS, records.tobytes())
    )


@pytest.mark.parametrize("padded", [False, True])
def test_records_are_a_view_of_what_was_received(play: Play, padded: bool) -> None:
    records = some_records(2000)
    datagrams: list[bytes] = []

    def answer(number: int) -> list[bytes]:
        datagrams[:] = [run_of(number, records, padded), verdict(number, DONE)]
        return list(datagrams)

    play(info, answer)
    (run,) = Module().checksum(PROCESS, ADDRESS, 2000)
    assert (run.address, run.refused_pages) == (ADDRESS, 0)
    assert run.records.tolist() == records.tolist()
    assert not run.records.flags.owndata
    received = np.frombuffer(datagrams[0], dtype=np.uint8)
    assert np.shares_memory(run.records, received)
    start = run.records.__array_interface__["data"][0]
    assert start % 4 == 0
    assert start + run.records.nbytes == received.__array_interface__["data"][0] + len(received)


def test_records_outlive_the_socket(play: Play) -> None:
    records = some_records(3)
    play(info, lambda number: [run_of(number, records) + verdict(number, DONE)])
    with Module() as opened:
        (run,) = opened.checksum(PROCESS, ADDRESS, 3)
    assert run.records.tolist() == records.tolist()


def test_refused_pages_are_counted(play: Play) -> None:
    def answer(number: int) -> list[bytes]:
        body = attribute(Attribute.ADDRESS, struct.pack("=Q", ADDRESS))
        body += attribute(Attribute.REFUSED, struct.pack("=Q", 2**40))
        return [message(number, body=body), verdict(number, DONE)]

    play(info, answer)
    (run,) = Module().checksum(PROCESS, ADDRESS, 5)
    assert (run.address, run.refused_pages, len(run.records)) == (ADDRESS, 2**40, 0)
    assert run.records.dtype == RECORD


def test_a_range_is_asked_for_in_parts(play: Play) -> None:
    kernel = play(info, *[lambda number: [verdict(number, DONE)]] * 2)
    full = np.zeros(module.PAGES_PER_DUMP + 9, dtype=bool)
    full[[1, -1]] = True
    asked = Module().checksum(PROCESS, ADDRESS, len(full), 256, undumpable=True, full=full)
    assert list(asked) == []
    first = np.packbits(full[: module.PAGES_PER_DUMP], bitorder="little").tobytes()
    for request, address, pages, bitmap in zip(
        kernel.requests[2:],
        (ADDRESS, ADDRESS + module.PAGES_PER_DUMP * 4096),
        (module.PAGES_PER_DUMP, 9),
        (first, b"\0\1"),
        strict=True,
    ):
        assert request[16:] == (
            struct.pack("=BBH", Command.CHECKSUM, contract.CONTRACT_VERSION, 0)
            + attribute(Attribute.PROCESSES, struct.pack("=IIQ", 1234, 1, 5678))
            + attribute(Attribute.ADDRESS, struct.pack("=Q", address))
            + attribute(Attribute.PAGES, struct.pack("=Q", pages))
            + attribute(Attribute.DEPTH, struct.pack("=I", 256))
            + attribute(Attribute.FULL_PAGES, bitmap)
        )


def test_candidates_are_sent_sorted_and_results_come_in_their_order(play: Play) -> None:
    def answer(number: int) -> list[bytes]:
        body = attribute(Attribute.RESULTS, bytes([3, 2, 1]))
        return [message(number, body=body), verdict(number, ERROR)]

    kernel = play(info, answer)
    other = ProcessId(pid=4321, start_time_ticks=2**40)
    candidates = np.array([(8192, 1, 0), (4096, 1, 0), (12288, 0, 0)], dtype=CANDIDATE)
    results = Module().merge(
        [PROCESS, other], candidates, undumpable=[other], any_node=True, split_percent=70
    )
    assert results.tolist() == [1, 2, 3]
    assert kernel.requests[2][16:] == (
        struct.pack("=BBH", Command.MERGE, contract.CONTRACT_VERSION, 0)
        + attribute(Attribute.PROCESSES, struct.pack("=IIQIIQ", 1234, 0, 5678, 4321, 1, 2**40))
        + attribute(Attribute.CANDIDATES, candidates[[2, 1, 0]].tobytes())
        + attribute(Attribute.FLAGS, struct.pack("=I", 1))
        + attribute(Attribute.SPLIT_PERCENT, struct.pack("=I", 70))
    )


def test_unmerge_tells_where_to_go_on(play: Play) -> None:
    def answer(number: int) -> list[bytes]:
        body = attribute(Attribute.UNMERGED, struct.pack("=Q", 7))
        body += attribute(Attribute.NEXT, struct.pack("=Q", 2**46))
        return [message(number, body=body), verdict(number, ERROR)]

    kernel = play(info, answer, info)
    opened = Module()
    done = opened.unmerge(PROCESS, ADDRESS, 9, count_only=True)
    assert (done.pages, done.next_address) == (7, 2**46)
    assert kernel.requests[2].endswith(
        attribute(Attribute.PAGES, struct.pack("=Q", 9)) + attribute(Attribute.COUNT_ONLY, b"")
    )
    with pytest.raises(ContractMismatch, match="UNMERGED"):
        opened.unmerge(PROCESS, ADDRESS, 9)


def test_info_is_decoded(play: Play) -> None:
    limits = np.array([(1, 2, 3, 4, 2**50)], dtype=LIMITS)
    counters = np.zeros(1, dtype=COUNTERS)
    counters["tlb_flushes"], counters["results"][0, 3] = 2**33, 11

    def answer(number: int) -> list[bytes]:
        body = attribute(Attribute.CONTRACT_VERSION, struct.pack("=I", 3))
        body += attribute(Attribute.MODULE_VERSION, b"0.3.0\0")
        body += attribute(Attribute.FEATURES, struct.pack("=Q", 2))
        body += attribute(Attribute.LIMITS, limits.tobytes() + b"something newer!")
        body += attribute(Attribute.COUNTERS, counters.tobytes()[:-8])  # as an older one has it
        return [message(number, body=body), verdict(number, ERROR)]

    play(info, answer)
    told = Module().info()
    assert (told.contract_version, told.module_version) == (3, "0.3.0")
    assert told.features == contract.Feature.SPLIT
    assert (told.limits.max_mappings, told.limits.max_shared_bytes) == (4, 2**50)
    assert (told.counters.tlb_flushes, told.counters.split_failures) == (2**33, 0)
    assert told.counters.results[contract.Result.NOPAGE1] == 11
    assert told.totals.shared_pages == 0


def test_another_contract_is_refused(play: Play) -> None:
    def other(number: int) -> list[bytes]:
        version = attribute(Attribute.CONTRACT_VERSION, struct.pack("=I", 99))
        return [message(number, body=version), verdict(number, ERROR)]

    play(other)
    with pytest.raises(ContractMismatch, match="version 99"):
        Module()
