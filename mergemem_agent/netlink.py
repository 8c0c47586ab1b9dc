# SPDX-License-Identifier: MIT
"""A generic netlink socket: one request at a time, every error with the kernel's own words.

A message is a header of 16 bytes, the command, and a flat list of numbered attributes. Each starts
at a multiple of 4 bytes, and so does each message of a datagram. All numbers are in the machine's
byte order. Documented in netlink(7) and in the kernel's Documentation/userspace-api/netlink.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from mergemem_agent.error import MergememError

# linux/socket.h
SOL_NETLINK: Final = 270

# linux/netlink.h
NETLINK_GENERIC: Final = 16
NETLINK_CAP_ACK: Final = 10  # errors do not echo the request, which may be large
NETLINK_EXT_ACK: Final = 11  # errors come with a text
NLM_F_REQUEST: Final = 0x1
NLM_F_ACK: Final = 0x4  # a request: report success, too
NLM_F_DUMP: Final = 0x300  # a request: of all, not of one
NLM_F_ACK_TLVS: Final = 0x200  # an answer: attributes follow the error
NLMSG_ERROR: Final = 2  # the end of what is no dump: errno or 0, header of the request, attributes
NLMSG_DONE: Final = 3  # the end of a dump: errno or 0, attributes
NLMSGERR_ATTR_MSG: Final = 1
NLA_TYPE_MASK: Final = 0x3FFF  # the two bits above it are flags

# linux/genetlink.h: the family that knows all families by name
GENL_ID_CTRL: Final = 16
CTRL_VERSION: Final = 2  # net/netlink/genetlink.c
CTRL_CMD_GETFAMILY: Final = 3
CTRL_ATTR_FAMILY_ID: Final = 1
CTRL_ATTR_FAMILY_NAME: Final = 2

_MESSAGE: Final = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence number, port
_COMMAND: Final = struct.Struct("=BBH")  # genlmsghdr: command, version of the family, nothing
_ATTRIBUTE: Final = struct.Struct("=HH")  # nlattr: length with this header, number
_ERROR: Final = struct.Struct("=i")  # -errno, or 0 for success

# A dump fills the buffer that its reader offered last, up to 32 KiB of payload.
RECEIVE_BYTES: Final = 65536

# The kernel answers before send() returns; a wait this long means that something is broken.
ANSWER_SECONDS: Final = 60.0

# What a request is made of: numbers and payloads, the latter of at most 65,531 bytes.
Attributes = Iterable[tuple[int, bytes]]

# One message of an answer: payloads by number, as views of what was received.
Reply = Mapping[int, memoryview]


class NetlinkFailure(MergememError):
    """The kernel refused a request. `code` is the errno, `text` its extended-ack text or ''."""

    def __init__(self, code: int, text: str) -> None:
        """Describe errno `code` in the kernel's words, or in libc's when it gave none."""
        super().__init__(text or os.strerror(code))
        self.code = code
        self.text = text


class FamilyMissing(MergememError):
    """No generic netlink family of this name is registered."""


def attributes_of(payload: memoryview) -> Reply:
    """Decode what follows the command of a message: attributes, and nothing copied."""
    found = {}
    offset = 0
    while offset + _ATTRIBUTE.size <= len(payload):
        length, number = _ATTRIBUTE.unpack_from(payload, offset)
        found[number & NLA_TYPE_MASK] = payload[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return found


class GenericNetlink:
    """One socket, for use by one thread, bound to one generic netlink family."""

    def __init__(self, family: str, version: int) -> None:
        """Open a socket and look the family up. Raises FamilyMissing, NetlinkFailure."""
        self.family = family
        self._version = version
        self._sequence_number = 0
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_GENERIC
        )
        try:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
            self._socket.settimeout(ANSWER_SECONDS)
            # Port 0 is the kernel. Nobody else can answer now, so answers are taken as they come.
            self._socket.connect((0, 0))
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

    def do(self, command: int, attributes: Attributes = ()) -> Reply | None:
        """Send one request; return its reply, or None when only success is reported.

        Raises NetlinkFailure, with ETIMEDOUT when there was no answer in ANSWER_SECONDS.
        """
        request = payload_of(command, self._version, attributes)
        replies = self._exchange(self._type, NLM_F_ACK, request)
        return replies[0] if replies else None

    def dump(
        self,
        command: int,
        attributes: Attributes = (),
        decode: Callable[[memoryview], Any] = attributes_of,
    ) -> list[Any]:
        """Send one dump request; return its replies in their order. Raises as do() does.

        Each is what `decode` makes of the attributes of one message: that is most of the work
        where a dump has very many. The dump is read to its end before anything is returned: one
        that is abandoned half way would keep the socket busy. So ask for no more than you want to
        hold in memory.
        """
        request = payload_of(command, self._version, attributes)
        return self._exchange(self._type, NLM_F_DUMP, request, decode)

    def _find_family(self) -> int:
        name = (CTRL_ATTR_FAMILY_NAME, self.family.encode() + b"\0")
        request = payload_of(CTRL_CMD_GETFAMILY, CTRL_VERSION, [name])
        try:
            (reply,) = self._exchange(GENL_ID_CTRL, NLM_F_ACK, request)
        except NetlinkFailure as failure:
            if failure.code != errno.ENOENT:
                raise
            raise FamilyMissing(f"generic netlink family {self.family} is not there") from None
        return number_of(reply[CTRL_ATTR_FAMILY_ID])

    def _exchange(
        self,
        family: int,
        mode: int,
        request: bytes,
        decode: Callable[[memoryview], Any] = attributes_of,
    ) -> list[Any]:
        """Send a request; return its replies once the kernel says that these were all."""
        self._sequence_number = (self._sequence_number + 1) & 0xFFFF_FFFF
        length = _MESSAGE.size + len(request)
        header = _MESSAGE.pack(length, family, NLM_F_REQUEST | mode, self._sequence_number, 0)
        self._socket.send(header + request)
        replies: list[Any] = []
        while True:
            for kind, flags, sequence_number, payload in messages_of(self._receive()):
                if sequence_number != self._sequence_number:
                    continue  # the rest of a request that was given up on a signal
                if kind in (NLMSG_ERROR, NLMSG_DONE):
                    _raise_failure(kind, flags, payload)
                    return replies
                replies.append(decode(payload[_COMMAND.size :]))

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


def payload_of(command: int, version: int, attributes: Attributes) -> bytes:
    """Encode a message but for its header. Raises struct.error: an attribute is too long."""
    parts = [_COMMAND.pack(command, version, 0)]
    for number, value in attributes:
        parts += (_ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), number), value)
        parts.append(bytes(-len(value) % 4))
    return b"".join(parts)


def messages_of(data: bytes) -> Iterator[tuple[int, int, int, memoryview]]:
    """Yield type, flags, sequence number and payload of each message of a datagram."""
    view = memoryview(data)
    offset = 0
    while offset + _MESSAGE.size <= len(data):
        length, kind, flags, sequence_number, _ = _MESSAGE.unpack_from(data, offset)
        yield kind, flags, sequence_number, view[offset + _MESSAGE.size : offset + length]
        offset += (length + 3) & ~3


def number_of(value: memoryview) -> int:
    """Decode an unsigned number of any size."""
    return int.from_bytes(value, sys.byteorder)


def text_of(value: memoryview | None) -> str:
    """Decode a string up to its final zero; '' for an attribute that is not there."""
    return bytes(value or b"").rstrip(b"\0").decode(errors="replace")


def _raise_failure(kind: int, flags: int, payload: memoryview) -> None:
    (error,) = _ERROR.unpack_from(payload)
    if error == 0:
        return
    text = ""
    if flags & NLM_F_ACK_TLVS:
        before = _ERROR.size + (_MESSAGE.size if kind == NLMSG_ERROR else 0)
        text = text_of(attributes_of(payload[before:]).get(NLMSGERR_ATTR_MSG))
    raise NetlinkFailure(-error, text)
