# SPDX-License-Identifier: MIT
"""Tests that run as root in a guest, against the real module: `make test-vm`.

The scene of every test:

    test ── socket per process ──> actor, actor's child, ...   memory known to the byte (actor.c)
      │                               │
      ├── netlink ──> mergemem.ko ────┘                        what the kernel did (wire.py)
      ├── pagemap, kpagecount, kpageflags                      which frames it left (frames.py)
      └── /dev/kmsg                                            what it complained of (kernel_log.py)
"""
