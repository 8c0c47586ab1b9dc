# SPDX-License-Identifier: MIT
"""The journal of a soak: one JSON object a line, each on the host's disk before work goes on.

A guest may be lost at any moment; what it had begun and what it had finished must survive it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class Journal:
    """Events, in order; each has an "event" that says what it is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **values: Any) -> None:
        """Append, and wait until it is stored."""
        line = json.dumps({"event": event} | values) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self) -> list[Event]:
        """All events so far."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        # The last line of a lost guest may be torn.
        return [json.loads(line) for line in lines if line.endswith("}")]

    def of(self, event: str) -> list[Event]:
        """The events of one kind."""
        return [entry for entry in self.read() if entry["event"] == event]
