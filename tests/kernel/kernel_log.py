# SPDX-License-Identifier: MIT
"""What the kernel logs while a test runs.

The rig judges the log of the whole run, by the same patterns; this names the test that it was.
"""

from __future__ import annotations

import os

from tests.vm import log


class KernelLog:
    """The records of /dev/kmsg since it was made."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._descriptor, 0, os.SEEK_END)

    def close(self) -> None:
        """Stop watching."""
        os.close(self._descriptor)

    def read(self) -> list[str]:
        """All lines so far."""
        while True:
            try:
                record = os.read(self._descriptor, 8192)
            except BlockingIOError:
                return self.lines
            # "level,sequence,time,flags;text", then lines of properties.
            self.lines.append(record.decode(errors="replace").partition(";")[2].split("\n")[0])

    def complaints(self) -> tuple[str, ...]:
        """The lines that no test may cause."""
        return log.findings("\n".join(self.read()))
