# SPDX-License-Identifier: MIT
"""A block device that answers when the test says so.

How does one keep an O_DIRECT read in flight for as long as a test wants? The network block device
asks a server, over a socket, for every byte. Here the server is this process.

Source: linux/nbd.h, and the protocol's "simple reply" of doc/proto.md of the nbd project.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import subprocess
import threading
from pathlib import Path
from types import TracebackType

from tests.kernel.sharing import wait_until

NBD_SET_SOCK, NBD_SET_BLKSIZE, NBD_DO_IT, NBD_CLEAR_SOCK, NBD_SET_SIZE_BLOCKS, NBD_DISCONNECT = (
    0xAB00,
    0xAB01,
    0xAB03,
    0xAB04,
    0xAB07,
    0xAB08,
)
REQUEST = struct.Struct(">IHHQQI")
REPLY_MAGIC = 0x67446698
PAGE_BYTES = 4096
SIZE = Path("/sys/block/nbd0/size")


class SlowDisk:
    """A disk of `content`, repeated; reads wait between hold() and release()."""

    path = Path("/dev/nbd0")

    def __init__(self, content: bytes, pages: int = 256) -> None:
        self._content = content
        self._pages = pages
        self._may_answer = threading.Event()
        self._may_answer.set()
        self.asked = threading.Event()

    def __enter__(self) -> SlowDisk:
        subprocess.run(["modprobe", "nbd", "nbds_max=1", "max_part=0"], check=True)
        ours, theirs = socket.socketpair()
        self._device = os.open(self.path, os.O_RDWR)
        fcntl.ioctl(self._device, NBD_SET_BLKSIZE, PAGE_BYTES)
        fcntl.ioctl(self._device, NBD_SET_SIZE_BLOCKS, self._pages)
        fcntl.ioctl(self._device, NBD_SET_SOCK, theirs.fileno())
        self._kernel = threading.Thread(target=self._run_device, args=(theirs,))
        self._server = threading.Thread(target=self._serve, args=(ours,))
        self._kernel.start()
        self._server.start()
        wait_until(lambda: SIZE.read_text() != "0\n", "the disk has its size")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
        fcntl.ioctl(self._device, NBD_DISCONNECT)
        self._kernel.join()
        self._server.join()
        os.close(self._device)

    def hold(self) -> None:
        """From now on reads wait."""
        self._may_answer.clear()
        self.asked.clear()

    def release(self) -> None:
        """Answer those that wait, and all that come."""
        self._may_answer.set()

    def _run_device(self, theirs: socket.socket) -> None:
        # Returns when the device is disconnected, with whatever error that is to it.
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._device, NBD_DO_IT)
        fcntl.ioctl(self._device, NBD_CLEAR_SOCK)
        theirs.close()

    def _serve(self, ours: socket.socket) -> None:
        while request := _receive(ours, REQUEST.size):
            _, _, kind, handle, offset, length = REQUEST.unpack(request)
            if kind == 2:
                break
            self.asked.set()
            self._may_answer.wait()
            data = self._content * (length // len(self._content) + 2)
            start = offset % len(self._content)
            reply = struct.pack(">IIQ", REPLY_MAGIC, 0, handle) + data[start : start + length]
            ours.sendall(reply)
        ours.close()


def _receive(source: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = source.recv(length - len(data))
        if not part:
            return b""
        data += part
    return data
