# SPDX-License-Identifier: MIT
"""Customers of the shop: HTTP requests all the while, each answer checked byte by byte.

    python -m tests.demo.load HOST PORT LOG [--customers N] [--think-seconds S]

Runs until SIGTERM. Each response is a line of LOG (read_log() gives them back):

    end_seconds latency_seconds right|wrong worker_pid path

end_seconds is of the monotonic clock, which is the same in every process. What people ask for is
skewed, as ever: the nth popular product is asked for about 1/n as often as the first.

The customers ask to keep their connections. Gunicorn's sync workers close each one after the
answer, so they connect anew for every request, as they would in production.
"""

from __future__ import annotations

import argparse
import http.client
import math
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tests.demo import catalogue

LIST_SHARE = 0.1
REQUEST_LIMIT_SECONDS = 60


@dataclass(frozen=True)
class Response:
    """One line of the log."""

    end_seconds: float
    latency_seconds: float
    right: bool
    worker_pid: int
    path: str


def read_log(path: Path) -> list[Response]:
    """The responses so far; a line still being written is left out."""
    responses = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            end, latency, verdict, worker, what = line.split()
            responses.append(
                Response(float(end), float(latency), verdict == "right", int(worker), what)
            )
    return responses


class Customer:
    """One keep-alive client that asks, waits for the answer, checks it, and thinks."""

    def __init__(self, number: int, host: str, port: int) -> None:
        self.random = random.Random(number)
        self.connection = http.client.HTTPConnection(host, port, timeout=REQUEST_LIMIT_SECONDS)

    def wish(self) -> tuple[str, Callable[[], bytes]]:
        """A path, and how to compute the answer."""
        rank = int(math.exp(self.random.random() * math.log(catalogue.PRODUCTS)))
        # Popular products lie anywhere in the catalogue.
        number = rank * 7919 % catalogue.PRODUCTS
        if self.random.random() < LIST_SHARE:
            start = number - number % catalogue.LIST_PRODUCTS
            numbers = range(start, start + catalogue.LIST_PRODUCTS)
            return f"/list/{start}", lambda: catalogue.list_answer(map(catalogue.product, numbers))
        return f"/product/{number}", lambda: catalogue.product_answer(catalogue.product(number))

    def ask(self, path: str, expected: Callable[[], bytes]) -> Response:
        """One request and its verdict; an answer that does not come is a wrong one."""
        started = time.monotonic()
        worker = 0
        try:
            self.connection.request("GET", path, headers={"Connection": "keep-alive"})
            response = self.connection.getresponse()
            body = response.read()
            worker = int(response.headers["X-Worker"] or 0)
            answered = response.status == 200
        except (OSError, http.client.HTTPException) as error:
            print(f"{path}: {error!r}", file=sys.stderr)
            self.connection.close()
            answered, body = False, b""
        ended = time.monotonic()
        right = answered and body == expected()
        return Response(ended, ended - started, right, worker, path)

    def run(self, log: TextIO, lock: threading.Lock, stop: threading.Event, think: float) -> None:
        while not stop.wait(self.random.uniform(0.5, 1.5) * think):
            answer = self.ask(*self.wish())
            verdict = "right" if answer.right else "wrong"
            with lock:
                log.write(
                    f"{answer.end_seconds:.6f} {answer.latency_seconds:.6f} {verdict} "
                    f"{answer.worker_pid} {answer.path}\n"
                )
                log.flush()


def in_window(responses: list[Response], start: float, end: float) -> Iterator[Response]:
    """Those that ended between two instants of the monotonic clock."""
    return (response for response in responses if start <= response.end_seconds < end)


def main() -> int:
    """Until SIGTERM."""
    parser = argparse.ArgumentParser(description="customers of the shop")
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("log", type=Path)
    parser.add_argument("--customers", type=int, default=4)
    parser.add_argument("--think-seconds", type=float, default=0.2)
    arguments = parser.parse_args()

    stop, lock = threading.Event(), threading.Lock()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with open(arguments.log, "w", encoding="utf-8") as log:
        threads = [
            threading.Thread(
                target=Customer(number, arguments.host, arguments.port).run,
                args=(log, lock, stop, arguments.think_seconds),
            )
            for number in range(arguments.customers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
