# SPDX-License-Identifier: MIT
"""A prefork fleet of Python in small: loads, forks, serves; fork's sharing breaks, as it does.

    python -m tests.bench.race.prefork OPT_IN PRODUCTS WORKERS

The catalogue is the demo's. Each worker looks at every product, as requests in their thousands
would, which writes its reference count, and collects garbage, which writes its header. Says
"ready PID…" then, and obeys "verify" on standard input: every worker computes a digest over all
that it holds. Ends with its standard input.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from tests.demo import catalogue, frames

PR_SET_MEMORY_MERGE = 67
MADV_MERGEABLE = 12


def opt_in(how: str) -> None:
    """What KSM needs: by prctl, which forks inherit, or for what is mapped now."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed = False
    if how == "prctl":
        failed = bool(libc.prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0))
    elif how == "madvise":
        for start, end in list(frames.anonymous(os.getpid())):
            size = ctypes.c_size_t(end - start)
            failed |= bool(libc.madvise(ctypes.c_void_p(start), size, MADV_MERGEABLE))
    if failed:
        raise OSError(ctypes.get_errno(), f"opting in by {how}")


def serve(products: list[catalogue.Product]) -> None:
    """Look at everything, twice, and collect the garbage of it."""
    for _ in range(2):
        for product in products:
            for value in product.values():
                str(value)
        gc.collect()


def work(orders: Connection, products: list[catalogue.Product], how: str) -> None:
    """A worker, until its orders end."""
    serve(products)
    if how == "madvise":
        opt_in(how)  # what it has mapped since the fork
    orders.send("served")
    while True:
        try:
            orders.recv()
        except EOFError:
            return
        orders.send(catalogue.digest(products))


def main() -> int:
    """The master."""
    how, count, workers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if how == "prctl":
        opt_in(how)
    expected = catalogue.digest(map(catalogue.product, range(count)))
    products = [catalogue.product(number) for number in range(count)]
    if how == "madvise":
        opt_in(how)
    ends: list[Connection] = []
    pids = []
    for _ in range(workers):
        mine, theirs = Pipe()
        if not (pid := os.fork()):
            for end in [*ends, mine]:
                end.close()
            work(theirs, products, how)
            os._exit(0)
        theirs.close()
        ends.append(mine)
        pids.append(pid)
    for end in ends:
        end.recv()
    print("ready", *pids, flush=True)
    for _ in sys.stdin:
        for end in ends:
            end.send("verify")
        wrong = sum(end.recv() != expected for end in ends)
        print(f"wrong {wrong}" if wrong else "ok", flush=True)
    for end in ends:
        end.close()
    return int(any(os.waitpid(pid, 0)[1] for pid in pids))


if __name__ == "__main__":
    sys.exit(main())
