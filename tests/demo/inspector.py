# SPDX-License-Identifier: MIT
"""Asks the workers themselves: is everything that you hold what it must be?

A request cannot choose its worker. So as many are asked at once as there are workers, again and
again, until each has answered: a worker that is busy with one leaves the next to another.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tests.demo import catalogue, fleet

MAX_ROUNDS = 30
REQUEST_LIMIT_SECONDS = 120


class InspectionError(Exception):
    """A worker could not be reached, or did not answer."""


@dataclass
class Findings:
    """What inspections have found so far, added up."""

    responses: int = 0
    wrong_responses: int = 0
    checked_pages: int = 0
    wrong_pages: int = 0
    checked_objects: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, right: bool, pages: int = 0, wrong_pages: int = 0, objects: int = 0) -> None:
        with self._lock:
            self.responses += 1
            self.wrong_responses += not right
            self.checked_pages += pages
            self.wrong_pages += wrong_pages
            self.checked_objects += objects

    def as_dict(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}


class Inspector:
    """Knows what the shop must say, without having asked it."""

    def __init__(self, report: bytes) -> None:
        self.findings = Findings()
        self._report = report

    def verify_objects(self, workers: Collection[int]) -> None:
        """Have each worker read all its objects: afterwards none of them is shared any more."""
        self._ask_until("/report", workers)

    def verify_pages(self, workers: Collection[int]) -> None:
        """Have each worker compare every page whose content is known; what is shared stays so."""
        self._ask_until("/verify", workers)

    def _ask_until(self, path: str, workers: Collection[int]) -> None:
        missing = set(workers)
        for _ in range(MAX_ROUNDS):
            with ThreadPoolExecutor(len(workers)) as pool:
                missing -= set(pool.map(self._ask, [path] * len(workers)))
            if not missing:
                return
        raise InspectionError(f"{path}: no answer from {sorted(missing)} in {MAX_ROUNDS} rounds")

    def _ask(self, path: str) -> int:
        """One request; the pid of the worker that answered, 0 if none did."""
        connection = http.client.HTTPConnection(*fleet.ADDRESS, timeout=REQUEST_LIMIT_SECONDS)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            self.findings.add(right=False)
            return 0
        finally:
            connection.close()
        if response.status != 200:
            self.findings.add(right=False)
        elif path == "/report":
            self.findings.add(right=body == self._report, objects=catalogue.PRODUCTS)
        else:
            answer = json.loads(body)
            pages, wrong_pages = int(answer["checked_pages"]), int(answer["wrong_pages"])
            self.findings.add(wrong_pages == 0, pages, wrong_pages)
        return int(response.headers["X-Worker"] or 0)
