# SPDX-License-Identifier: MIT
"""Outside judges: programs nobody here wrote, while their memory is merged without pause.

    make judges KERNEL=6.12
    python3 -m tests.judges --list

A judge is a program that checks its own results: a stress test, a database, the test-suite of a
language. It runs as in real life, and does not know that another program, the merger, merges all
pages of its processes that seem to be equal, over and over, far more recklessly than the agent.
Whatever the module gets wrong, a judge may see as a wrong byte. It passes only if it found nothing
wrong and if really many of its pages were merged meanwhile.

- provision.py: the judges' packages and the merger, on the host
- merger.c, merger.py: the merger, and what it did
- judge.py: what a judge is, and how one is run
- stress.py, sqlite.py, postgres.py, redis.py, cpython.py: the judges; catalogue.py lists them
- table.py: what a person gets to see
- boot.py: a guest, on the host, to run them in
"""
