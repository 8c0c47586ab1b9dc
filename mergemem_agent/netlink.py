# SPDX-License-Identifier: MIT
"""A generic netlink socket: one request at a time, every error with the kernel's own words.

Messages are pyroute2's classes; the socket is Python's. pyroute2's own sockets would do, but
for four things that the agent cannot live with, and that differ between 0.7 and 0.9:

- an answer of EBUSY is retried for nine seconds (0.7), where the agent must stop within two;
- the kernel's extended-ack text is lost in larger requests, as the echo of the request is
  taken for an attribute; asking for NETLINK_CAP_ACK to avoid the echo loses it always;
- an error that ends a dump half way arrives in the NLMSG_DONE, and is dropped unless the kernel
  adds a text (both), or success is taken for an error when it does (0.7);
- 0.9 runs an asyncio loop for each call, which fails inside another loop and leaks a
  descriptor for each calling thread.

What is left of a socket after that is one sendto() and one recvmsg().
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

from pyroute2.netlink import (
    CTRL_CMD_GETFAMILY,
    GENL_ID_CTRL,
    NETLINK_EXT_ACK,
    NETLINK_GENERIC,
    NLM_F_ACK,
    NLM_F_ACK_TLVS,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    SOL_NETLINK,
    ctrlmsg,
    genlmsg,
    nla_base,
    nlmsg,
)

from mergemem_agent.error import MergememError

NETLINK_CAP_ACK: Final = 10  # not named by pyroute2: errors need not echo the request

# A dump fills the buffer that its reader offered last, up to 32 KiB of payload.
RECEIVE_BYTES: Final = 65536

# The kernel answers before sendto() returns; a wait this long means that something is broken.
ANSWER_SECONDS: Final = 60.0

# One message's attributes as pyroute2 takes them: (name, value) pairs.
Attributes = Sequence[tuple[str, Any]]


class NetlinkFailure(MergememError):
    """The kernel refused a request. `code` is the errno, `text` its extended-ack text or ''."""

    def __init__(self, code: int, text: str) -> None:
        """Describe errno `code` in the kernel's words, or in libc's when it gave none."""
        super().__init__(text or os.strerror(code))
        self.code = code
        self.text = text


class FamilyMissing(MergememError):
    """No generic netlink family of this name is registered."""


class PackedArray(nla_base):  # type: ignore[misc]
    """A binary attribute, decoded as a view of the received bytes instead of a copy."""

    __slots__ = ()

    fields = (("value", "s"),)

    def ft_decode(self, offset: int) -> None:  # noqa: ARG002  (pyroute2's signature)
        """Take the payload: what follows the attribute's header of 4 bytes."""
        self["value"] = memoryview(self.data)[self.offset + 4 : self.offset + self.length]


_ACKNOWLEDGEMENT_ATTRIBUTES = (
    ("NLMSGERR_ATTR_UNUSED", "none"),
    ("NLMSGERR_ATTR_MSG", "asciiz"),
    ("NLMSGERR_ATTR_OFFS", "uint32"),
    ("NLMSGERR_ATTR_COOKIE", "cdata"),
)


class ErrorMessage(nlmsg):  # type: ignore[misc]
    """NLMSG_ERROR with NETLINK_CAP_ACK set: errno, header of the request, attributes."""

    __slots__ = ()

    fields = (
        ("error", "i"),
        ("request_length", "I"),
        ("request_type", "H"),
        ("request_flags", "H"),
        ("request_sequence_number", "I"),
        ("request_port", "I"),
    )
    nla_map = _ACKNOWLEDGEMENT_ATTRIBUTES


class DoneMessage(nlmsg):  # type: ignore[misc]
    """NLMSG_DONE, the end of a dump: errno or 0, attributes."""

    __slots__ = ()

    fields = (("error", "i"),)
    nla_map = _ACKNOWLEDGEMENT_ATTRIBUTES


class GenericNetlink:
    """One socket, for use by one thread, bound to one generic netlink family.

    Each message that is sent or received is of class `message`, whose `nla_map` names the
    family's attributes in the order of their numbers. Leave its `prefix` unset: pyroute2 0.7
    ignores it when an attribute is looked up, 0.9 applies it.
    """

    def __init__(self, family: str, version: int, message: type[genlmsg]) -> None:
        """Open a socket and look the family up. Raises FamilyMissing, NetlinkFailure."""
        self.family = family
        self._version = version
        self._message = message
        self._sequence_number = 0
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_GENERIC
        )
        try:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
            self._socket.settimeout(ANSWER_SECONDS)
            self._socket.bind((0, 0))
            self._type = self._find_family()
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Close the socket. The object is of no use afterwards."""
        self._socket.close()

    def __enter__(self) -> GenericNetlink:
        """Return the open socket; leaving the block closes it."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the socket."""
        self.close()

    def do(self, command: int, attributes: Attributes = ()) -> genlmsg | None:
        """Send one request; return its reply, or None when only success is reported."""
        replies = list(self._exchange(self._request(command, attributes), NLM_F_ACK))
        return replies[0] if replies else None

    def dump(self, command: int, attributes: Attributes = ()) -> list[genlmsg]:
        """Send one dump request; return its replies in their order.

        The dump is read to its end before anything is returned: one that is abandoned half way
        would keep the socket busy. So ask for no more than you want to hold in memory.
        """
        return list(self._exchange(self._request(command, attributes), NLM_F_DUMP))

    def _find_family(self) -> int:
        request = ctrlmsg()
        request["cmd"] = CTRL_CMD_GETFAMILY
        request["version"] = 1
        request["attrs"] = [("CTRL_ATTR_FAMILY_NAME", self.family)]
        request["header"]["type"] = GENL_ID_CTRL
        try:
            (reply,) = self._exchange(request, NLM_F_ACK)
        except NetlinkFailure as failure:
            if failure.code != errno.ENOENT:
                raise
            raise FamilyMissing(f"generic netlink family {self.family} is not there") from None
        return int(reply.get_attr("CTRL_ATTR_FAMILY_ID"))

    def _request(self, command: int, attributes: Attributes) -> genlmsg:
        request = self._message()
        request["cmd"] = command
        request["version"] = self._version
        request["attrs"] = list(attributes)
        request["header"]["type"] = self._type
        return request

    def _exchange(self, request: genlmsg, flags: int) -> Iterator[genlmsg]:
        """Send a request and yield its replies, until the kernel says that this was all."""
        self._sequence_number += 1
        header = request["header"]
        header["flags"] = NLM_F_REQUEST | flags
        header["sequence_number"] = self._sequence_number
        request.encode()
        self._socket.sendto(request.data, (0, 0))
        reply_class = type(request)
        while True:
            data = self._receive()
            offset = 0
            while offset + 16 <= len(data):
                reply = _decode(data, offset, reply_class)
                offset += (reply["header"]["length"] + 3) & ~3
                if reply["header"]["sequence_number"] != self._sequence_number:
                    continue  # the rest of a request that was given up on a signal
                if isinstance(reply, (ErrorMessage, DoneMessage)):
                    _raise_failure(reply)
                    return
                yield reply

    def _receive(self) -> bytes:
        try:
            data, _, flags, _ = self._socket.recvmsg(RECEIVE_BYTES)
        except TimeoutError:
            raise NetlinkFailure(
                errno.ETIMEDOUT, f"no answer from family {self.family} in {ANSWER_SECONDS:.0f} s"
            ) from None
        if flags & socket.MSG_TRUNC:
            raise NetlinkFailure(errno.EMSGSIZE, f"a message exceeds {RECEIVE_BYTES} bytes")
        return data


def _decode(data: bytes, offset: int, reply_class: type[genlmsg]) -> nlmsg:
    kind = int.from_bytes(data[offset + 4 : offset + 6], sys.byteorder)
    if kind == NLMSG_ERROR:
        reply_class = ErrorMessage
    elif kind == NLMSG_DONE:
        reply_class = DoneMessage
    reply = reply_class(data, offset=offset)
    reply.decode()
    return reply


def _raise_failure(reply: nlmsg) -> None:
    if reply["error"] == 0:
        return
    text = ""
    if reply["header"]["flags"] & NLM_F_ACK_TLVS:
        text = reply.get_attr("NLMSGERR_ATTR_MSG") or ""
    raise NetlinkFailure(-reply["error"], text)
