# SPDX-License-Identifier: MIT
"""userfaultfd: the faults of one process, handled by another, as live migration does it.

The actor makes the descriptor, and we take a copy, so nothing of this is known to the actor.
Sources: Documentation/admin-guide/mm/userfaultfd.rst, include/uapi/linux/userfaultfd.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from tests.kernel.actor import ANSWER_SECONDS, PAGE_BYTES, Region
from tests.kernel.syscalls import copy_of_descriptor

UFFD_API, EVENT_PAGEFAULT = 0xAA, 0x12
FEATURE_WP, FEATURE_MOVE = 1 << 0, 1 << 16
FLAG_WRITE, FLAG_WP = 1 << 0, 1 << 1
MODE_MISSING, MODE_WP = 1 << 0, 1 << 1


def _read_write(number: int, size: int) -> int:
    return 3 << 30 | size << 16 | UFFD_API << 8 | number


def _read_only(number: int, size: int) -> int:
    return 2 << 30 | size << 16 | UFFD_API << 8 | number


API = _read_write(0x3F, 24)
REGISTER = _read_write(0x00, 32)
UNREGISTER = _read_only(0x01, 16)
COPY = _read_write(0x03, 40)
WRITEPROTECT = _read_write(0x06, 24)


class Userfault:
    """The userfaultfd of an actor."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.descriptor_of_actor = int(region.actor.ask("userfaultfd"))
        self.descriptor = copy_of_descriptor(region.actor.pid, self.descriptor_of_actor)
        features = self._do(API, struct.pack("=QQQ", UFFD_API, FEATURE_WP, 0))
        self.features = int(struct.unpack("=QQQ", features)[1])

    def _do(self, request: int, argument: bytes) -> bytes:
        return fcntl.ioctl(self.descriptor, request, argument)

    @property
    def _range(self) -> bytes:
        return struct.pack("=QQ", self.region.address, self.region.pages * PAGE_BYTES)

    def register(self, mode: int) -> None:
        """Watch the region."""
        self._do(REGISTER, self._range + struct.pack("=QQ", mode, 0))

    def unregister(self) -> None:
        """Watch it no longer."""
        self._do(UNREGISTER, self._range)

    def protect(self, on: bool) -> None:
        """Want to hear of writes, or let them go on."""
        self._do(WRITEPROTECT, self._range + struct.pack("=Q", int(on)))

    def copy(self, page: int, data: bytes) -> None:
        """Give a missing page its content, and let whoever waits for it go on."""
        source = ctypes.create_string_buffer(data, PAGE_BYTES)
        words = self.region[page].address, ctypes.addressof(source), PAGE_BYTES, 0, 0
        self._do(COPY, struct.pack("=QQQQq", *words))

    def event(self) -> tuple[int, int]:
        """Wait for a fault: its flags, and the address of its page."""
        ready, _, _ = select.select([self.descriptor], [], [], ANSWER_SECONDS)
        assert ready, "no event"
        kind, flags, address = struct.unpack_from("=BxxxxxxxQQ", os.read(self.descriptor, 32))
        assert kind == EVENT_PAGEFAULT
        return flags, address & -PAGE_BYTES

    def quiet(self) -> bool:
        """Whether there is no event."""
        return not select.select([self.descriptor], [], [], 0)[0]


@contextmanager
def watched(region: Region, mode: int) -> Iterator[Userfault]:
    """A region whose faults are ours for a while."""
    userfault = Userfault(region)
    userfault.register(mode)
    try:
        yield userfault
    finally:
        os.close(userfault.descriptor)
