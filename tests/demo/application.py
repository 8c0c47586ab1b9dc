# SPDX-License-Identifier: MIT
"""A web shop, as a WSGI application that breaks the sharing fork() gave it, as real ones do.

What a worker holds, and what becomes of the memory:

    catalogue   60,000 dicts, loaded before the fork. To look at an object is to write its reference
                count, and a collection writes every object's header: in the end each worker has a
                copy of its own, with equal content.
    ranking     a model's weights, loaded by each worker after the fork: copies from the start,
                never written.
    visits      counters that each worker keeps for itself: written by every request.

The answers depend on the request alone, so whoever asks can check every byte: /product/N and
/list/N are what customers look at, /report is the books, which read every object, and /verify has
a worker compare the pages that it loaded with what they must be.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from tests.demo import catalogue
from tests.demo.catalogue import PAGE_BYTES, PRODUCTS

RANKING_PAGES = 2048
VISIT_BYTES = 64  # a cache line for each product
VISITS_PAGES = -(-PRODUCTS * VISIT_BYTES // PAGE_BYTES)

Respond = Callable[[str, list[tuple[str, str]]], object]


class Pages:
    """Private anonymous memory of known content. Page-aligned: one comparison is one page."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.memory = mmap.mmap(-1, count * PAGE_BYTES, flags=flags)
        for number in range(count):
            self.memory.write(catalogue.page(name, number))

    def wrong(self, changes: Callable[[int, bytearray], object] | None = None) -> int:
        """How many pages are not what they were made as; `changes` are made to that first."""
        wrong_pages = 0
        for number in range(self.count):
            expected = bytearray(catalogue.page(self.name, number))
            if changes:
                changes(number, expected)
            start = number * PAGE_BYTES
            wrong_pages += self.memory[start : start + PAGE_BYTES] != expected
        return wrong_pages


class Visits:
    """A counter for each product, starting from noise, beside a shadow that knows the truth."""

    def __init__(self) -> None:
        self.pages = Pages("visits", VISITS_PAGES)
        self.shadow: Counter[int] = Counter()

    def add(self, number: int) -> None:
        self.shadow[number] += 1
        _increment(self.pages.memory, number * VISIT_BYTES, 1)

    def wrong(self) -> int:
        by_page: dict[int, list[int]] = {}
        for number in self.shadow:
            by_page.setdefault(number * VISIT_BYTES // PAGE_BYTES, []).append(number)

        def changes(page: int, content: bytearray) -> None:
            for number in by_page.get(page, ()):
                _increment(content, number * VISIT_BYTES % PAGE_BYTES, self.shadow[number])

        return self.pages.wrong(changes)


class Worker:
    """What a worker loads for itself at its first request."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.ranking = Pages("ranking", RANKING_PAGES)
        self.visits = Visits()

    def verify(self) -> bytes:
        """Compare every page. Reading them this way leaves shared ones shared."""
        answer = {
            "checked_pages": RANKING_PAGES + VISITS_PAGES,
            "wrong_pages": self.ranking.wrong() + self.visits.wrong(),
        }
        return json.dumps(answer).encode()


PRELOADED = [catalogue.product(number) for number in range(PRODUCTS)]
_worker: Worker | None = None


def application(environ: dict[str, Any], respond: Respond) -> Iterable[bytes]:
    """The WSGI entry point."""
    try:
        status, body = "200 OK", _answer(environ["PATH_INFO"])
    except LookupError:
        status, body = "404 Not Found", b"no such page"
    headers = [
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
        ("X-Worker", str(os.getpid())),
    ]
    respond(status, headers)
    return [body]


def _answer(path: str) -> bytes:
    global _worker
    if _worker is None:
        _worker = Worker()
    match path.split("/")[1:]:
        case ["product", number]:
            _worker.visits.add(int(number))
            return catalogue.product_answer(PRELOADED[int(number)])
        case ["list", number]:
            start = int(number)
            return catalogue.list_answer(PRELOADED[start : start + catalogue.LIST_PRODUCTS])
        case ["report"]:
            return catalogue.report_answer(PRELOADED)
        case ["verify"]:
            return _worker.verify()
    raise LookupError(path)


def _increment(memory: mmap.mmap | bytearray, offset: int, by: int) -> None:
    (value,) = struct.unpack_from("<Q", memory, offset)
    struct.pack_into("<Q", memory, offset, (value + by) % (1 << 64))
