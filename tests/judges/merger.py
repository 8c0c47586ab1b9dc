# SPDX-License-Identifier: MIT
"""The merger as a child of this process, and the account that it gives of itself."""

from __future__ import annotations

import errno
import json
import re
import subprocess
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tests.judges.provision import CONTRACT, MERGER

# One round may take seconds: it reads all memory of all processes.
STOP_SECONDS = 120


class MergerFailed(Exception):
    """The merger could not go on: a refusal that the contract does not explain."""


@dataclass(frozen=True)
class Account:
    """What the merger did, and what was shared when it ended."""

    results: dict[str, int]
    errors: dict[str, int]
    numbers: dict[str, int]

    @property
    def merged(self) -> int:
        """Pages that came to share a frame."""
        return self.results.get("SUCCESS", 0)

    @property
    def zeroed(self) -> int:
        """Pages that the kernel's zero page took the place of."""
        return self.results.get("ZEROED", 0)

    @property
    def replaced(self) -> int:
        """Both: pages that gave up a frame of their own, or shared it with others before."""
        return self.merged + self.zeroed

    def as_dict(self) -> dict[str, Any]:
        return {"results": self.results, "errors": self.errors, **self.numbers}


@dataclass(frozen=True)
class Settings:
    """How the merger goes about it."""

    zero: bool = True
    split: bool = True
    # A planted fault: wrong bytes in pages that were merged.
    plant: bool = False
    seed: int = 1
    # Nothing is merged: what a judge complains of then is its own affair.
    idle: bool = False

    def words(self) -> list[str]:
        flags = {"zero": self.zero, "split": self.split, "plant": self.plant}
        words = [f"{name}={int(value)}" for name, value in flags.items()]
        return [*words, f"seed={self.seed}", *(["rounds=0"] if self.idle else [])]


class Merger:
    """Merges the descendants of this process from start to stop."""

    def __init__(self, settings: Settings) -> None:
        words = [str(MERGER), *settings.words()]
        self._process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> Account:
        """End it; MergerFailed if it had to give up before."""
        self._process.terminate()
        return self.wait()

    def wait(self) -> Account:
        """Wait until it ends by itself."""
        try:
            output, complaint = self._process.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise MergerFailed(f"it does not end within {STOP_SECONDS} s") from None
        if self._process.returncode:
            raise MergerFailed(complaint.strip() or f"status {self._process.returncode}")
        return _account(json.loads(output))


def shared_now() -> tuple[int, int]:
    """Shared pages, and the mappings of them, by the module's own account."""
    with Merger(Settings(idle=True)) as merger:
        numbers = merger.wait().numbers
    return numbers["shared_pages"], numbers["shared_mappings"]


def _account(said: dict[str, Any]) -> Account:
    names = result_names()
    results = {names[int(code)]: count for code, count in said.pop("results").items()}
    errors = {errno.errorcode[int(code)]: count for code, count in said.pop("errors").items()}
    return Account(results, errors, said)


def result_names() -> list[str]:
    """Of enum mergemem_result, in order."""
    text = re.sub(r"/\*.*?\*/", "", CONTRACT.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.search(r"enum mergemem_result {(.*?)};", text, re.DOTALL)
    assert found, f"no results in {CONTRACT}"
    return re.findall(r"MERGEMEM_(\w+)", found[1].split("__MERGEMEM")[0])
