# SPDX-License-Identifier: MIT
"""The contract of kmod/uapi/mergemem.h over a bare netlink socket.

The agent has its own client; this one shares nothing with it, and can send what no client should.
"""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from tests.kernel.actor import Page, ProcessKey, Region
from tests.kernel.contract import (
    CANDIDATE,
    DEPTH_FULL_BYTES,
    GROUP_ZERO,
    MERGE_ANY_NODE,
    PROCESS,
    PROCESS_UNDUMPABLE,
    RECORD,
    Attribute,
    Command,
    Records,
    Result,
    struct_text,
)

# From linux/netlink.h and linux/genetlink.h; the socket module has only a few of them.
NETLINK_GENERIC = 16
SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_EXT_ACK = 270, 10, 11
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLM_F_ACK_TLVS = 0x1, 0x4, 0x300, 0x200
NLMSGERR_ATTR_MSG = 1
GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME = 16, 3, 1, 2
RECEIVE_BYTES = 64 << 10
# A reply that has not come by then never comes.
REPLY_SECONDS = 120


class Refused(OSError):
    """The kernel refused a message; `text` is its extended acknowledgement, if it gave one."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(number, f"{os.strerror(number)}: {text or '(no text)'}")
        self.text = text


@dataclass(frozen=True)
class Info:
    """The reply to INFO."""

    contract_version: int
    module_version: str
    features: int
    limits: dict[str, int]
    counters: dict[str, int]
    # Candidates by result.
    results: tuple[int, ...]
    shared_pages: int
    shared_mappings: int


@dataclass(frozen=True)
class Run:
    """One message of a CHECKSUM dump: records, or a number of refused pages."""

    address: int
    records: Records
    refused_pages: int


def attribute(kind: int, payload: bytes) -> bytes:
    """One netlink attribute, padded."""
    return struct.pack("=HH", len(payload) + 4, kind) + payload + bytes(-len(payload) % 4)


def message(kind: int, flags: int, payload: bytes, sequence: int = 1) -> bytes:
    """One netlink message."""
    return struct.pack("=IHHII", len(payload) + 16, kind, flags, sequence, 0) + payload


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes of a payload."""
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        yield kind & 0x3FFF, data[4:length]
        data = data[(length + 3) & ~3 :]


def processes(keys: Sequence[ProcessKey], flags: int = 0) -> bytes:
    """The payload of PROCESSES."""
    return b"".join(PROCESS.pack(key.pid, flags, key.start_time_ticks) for key in keys)


class Socket:
    """A generic netlink socket, and messages on it."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        self._socket.settimeout(REPLY_SECONDS)
        self._sequence = 0
        self._family = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    @property
    def family(self) -> int:
        """The number of our family; a missing one is Refused with ENOENT."""
        if not self._family:
            name = attribute(CTRL_ATTR_FAMILY_NAME, b"mergemem\0")
            request = struct.pack("=BBH", CTRL_CMD_GETFAMILY, 1, 0) + name
            (reply,) = self.exchange(message(GENL_ID_CTRL, NLM_F_REQUEST | NLM_F_ACK, request))
            self._family = struct.unpack("=H", dict(attributes(reply[4:]))[CTRL_ATTR_FAMILY_ID])[0]
        return self._family

    def request(self, command: int, payload: bytes, flags: int = 0) -> list[dict[int, bytes]]:
        """Send a request of our family; the attributes of each message of the reply."""
        header = struct.pack("=BBH", command, 1, 0)
        flags |= NLM_F_REQUEST | NLM_F_ACK
        replies = self.exchange(message(self.family, flags, header + payload))
        return [dict(attributes(reply[4:])) for reply in replies]

    def exchange(self, data: bytes) -> list[bytes]:
        """Send bytes as they are, and return what comes back until the verdict; Refused if bad.

        The sequence number is put in here, so that a late answer is never taken for this one's.
        """
        self._sequence += 1
        data = data[:8] + struct.pack("=I", self._sequence) + data[12:]
        self._socket.send(data)
        replies: list[bytes] = []
        while True:
            for kind, flags, sequence, payload in _messages(self._socket.recv(RECEIVE_BYTES)):
                if sequence != self._sequence:
                    continue
                if kind not in (NLMSG_ERROR, NLMSG_DONE):
                    replies.append(payload)
                    continue
                _raise_error(kind, flags, payload)
                return replies


class Client(Socket):
    """What tests say to the module."""

    def info(self) -> Info:
        """INFO."""
        (reply,) = self.request(Command.INFO, b"")
        limits = struct.unpack("=IIIIQ", reply[Attribute.LIMITS])
        counters = struct.unpack("=40Q", reply[Attribute.COUNTERS])
        limit_names = re.findall(r"__u\d+ (\w+);", struct_text("limits"))
        counter_names = re.findall(r"__u64 (\w+);", struct_text("counters"))
        return Info(
            struct.unpack("=I", reply[Attribute.CONTRACT_VERSION])[0],
            reply[Attribute.MODULE_VERSION].rstrip(b"\0").decode(),
            struct.unpack("=Q", reply[Attribute.FEATURES])[0],
            dict(zip(limit_names, limits, strict=True)),
            dict(zip(counter_names, counters[:6] + counters[38:], strict=True)),
            counters[6:38],
            *struct.unpack("=QQ", reply[Attribute.TOTALS]),
        )

    def checksum(
        self,
        process: ProcessKey,
        address: int,
        pages: int,
        depth: int = DEPTH_FULL_BYTES,
        flags: int = 0,
        full: Collection[int] | None = None,
    ) -> list[Run]:
        """CHECKSUM: the runs of a range; `full` are the numbers of pages to be read in full."""
        payload = range_payload(process, address, pages, flags)
        payload += attribute(Attribute.DEPTH, struct.pack("=I", depth))
        if full is not None:
            payload += attribute(Attribute.FULL_PAGES, bitmap(full, pages))
        return [_run(reply) for reply in self.request(Command.CHECKSUM, payload, NLM_F_DUMP)]

    def records(
        self,
        region: Region,
        depth: int = DEPTH_FULL_BYTES,
        full: Collection[int] | None = None,
    ) -> Records:
        """CHECKSUM: one record per page of a region; 0 where there was no message."""
        records = np.zeros(region.pages, RECORD)
        of_region = region.actor.key, region.address, region.pages
        for run in self.checksum(*of_region, depth, full=full):
            first = (run.address - region.address) // 4096
            records[first : first + len(run.records)] = run.records
        return records

    def merge(
        self,
        *groups: Sequence[Page],
        undumpable: bool = False,
        any_node: bool = False,
        split_percent: int | None = None,
    ) -> list[list[Result]]:
        """MERGE: a list of results for each group."""
        flags = PROCESS_UNDUMPABLE if undumpable else 0
        payload = merge_payload(groups, flags) + options(any_node, split_percent)
        results = iter(self._merge(payload))
        return [[next(results) for _ in group] for group in groups]

    def merge_zeros(self, *pages: Page, split_percent: int | None = None) -> list[Result]:
        """MERGE of pages that are said to be filled with zeros."""
        keys = list(dict.fromkeys(page.process for page in pages))
        return self.merge_candidates(
            keys,
            [(page.address, keys.index(page.process), GROUP_ZERO) for page in pages],
            split_percent=split_percent,
        )

    def merge_candidates(
        self,
        keys: Sequence[ProcessKey],
        candidates: Sequence[tuple[int, int, int]],
        *,
        any_node: bool = False,
        split_percent: int | None = None,
    ) -> list[Result]:
        """MERGE of (address, index of the process, group) in this order."""
        payload = candidates_payload(keys, candidates) + options(any_node, split_percent)
        results = self._merge(payload)
        assert len(results) == len(candidates)
        return results

    def _merge(self, payload: bytes) -> list[Result]:
        (reply,) = self.request(Command.MERGE, payload)
        return [Result(code) for code in reply[Attribute.RESULTS]]

    def unmerge(
        self, process: ProcessKey, address: int, pages: int, *, count_only: bool = False
    ) -> tuple[int, int]:
        """UNMERGE: how many pages, and the address to go on from."""
        payload = unmerge_payload(process, address, pages, count_only=count_only)
        (reply,) = self.request(Command.UNMERGE, payload)
        unmerged, after = reply[Attribute.UNMERGED], reply[Attribute.NEXT]
        return struct.unpack("=Q", unmerged)[0], struct.unpack("=Q", after)[0]


def merge_payload(groups: Sequence[Sequence[Page]], flags: int = 0) -> bytes:
    """The attributes of MERGE for groups of pages."""
    keys = list(dict.fromkeys(page.process for group in groups for page in group))
    index = {key: number for number, key in enumerate(keys)}
    candidates = [
        (page.address, index[page.process], number)
        for number, group in enumerate(groups)
        for page in group
    ]
    return candidates_payload(keys, candidates, flags)


def candidates_payload(
    keys: Sequence[ProcessKey], candidates: Sequence[tuple[int, int, int]], flags: int = 0
) -> bytes:
    """The attributes of MERGE for (address, index of the process, group)."""
    packed = b"".join(CANDIDATE.pack(*candidate) for candidate in candidates)
    return attribute(Attribute.PROCESSES, processes(keys, flags)) + attribute(
        Attribute.CANDIDATES, packed
    )


def options(any_node: bool = False, split_percent: int | None = None) -> bytes:
    """The attributes of MERGE that it may do without."""
    payload = b""
    if any_node:
        payload += attribute(Attribute.FLAGS, struct.pack("=I", MERGE_ANY_NODE))
    if split_percent is not None:
        payload += attribute(Attribute.SPLIT_PERCENT, struct.pack("=I", split_percent))
    return payload


def unmerge_payload(
    process: ProcessKey, address: int, pages: int, *, count_only: bool = False
) -> bytes:
    """The attributes of UNMERGE."""
    payload = range_payload(process, address, pages)
    return payload + attribute(Attribute.COUNT_ONLY, b"") if count_only else payload


def bitmap(numbers: Collection[int], pages: int) -> bytes:
    """The payload of FULL_PAGES, with the bits of some of `pages` pages set."""
    bits = sum(1 << number for number in set(numbers))
    return bits.to_bytes((pages + 7) // 8, "little")


def range_payload(process: ProcessKey, address: int, pages: int, flags: int = 0) -> bytes:
    return (
        attribute(Attribute.PROCESSES, processes([process], flags))
        + attribute(Attribute.ADDRESS, struct.pack("=Q", address))
        + attribute(Attribute.PAGES, struct.pack("=Q", pages))
    )


def _run(reply: dict[int, bytes]) -> Run:
    records = np.frombuffer(reply.get(Attribute.RECORDS, b""), dtype=RECORD)
    refused = struct.unpack("=Q", reply.get(Attribute.REFUSED, bytes(8)))[0]
    assert (len(records) > 0) != (refused > 0), "a run has either records or refused pages"
    return Run(struct.unpack("=Q", reply[Attribute.ADDRESS])[0], records, refused)


def _messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    while len(data) >= 16:
        length, kind, flags, sequence, _ = struct.unpack_from("=IHHII", data)
        yield kind, flags, sequence, data[16:length]
        data = data[(length + 3) & ~3 :]


def _raise_error(kind: int, flags: int, payload: bytes) -> None:
    (error,) = struct.unpack_from("=i", payload)
    # The error of a dump that has begun comes in DONE, which carries no copy of the request.
    extra = payload[20:] if kind == NLMSG_ERROR else payload[4:]
    if error:
        found = dict(attributes(extra)) if flags & NLM_F_ACK_TLVS else {}
        raise Refused(-error, found.get(NLMSGERR_ATTR_MSG, b"").rstrip(b"\0").decode())
