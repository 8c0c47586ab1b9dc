# SPDX-License-Identifier: MIT
"""Maps of BPF programs, by the system call itself: bpf(2).

BCC's own tables turn each entry into Python objects, and cannot read per-CPU maps in batches. Here
a whole map comes as two arrays.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_SYS_BPF: Final = 321  # x86-64
_LOOKUP, _UPDATE, _DELETE, _LOOKUP_AND_DELETE_BATCH = 1, 2, 3, 25  # enum bpf_cmd

# A bucket of the hash has to fit into one batch; at a load of one entry it holds a few.
_BATCH_ENTRIES: Final = 4096

_libc = ctypes.CDLL(None, use_errno=True)


class _Element(ctypes.Structure):
    """The part of union bpf_attr for single entries."""

    _fields_ = (
        ("map_fd", ctypes.c_uint32),
        ("key", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class _Batch(ctypes.Structure):
    """The part of union bpf_attr for batches."""

    _fields_ = (
        ("in_batch", ctypes.c_uint64),
        ("out_batch", ctypes.c_uint64),
        ("keys", ctypes.c_uint64),
        ("values", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("map_fd", ctypes.c_uint32),
        ("elem_flags", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


def _bpf(command: int, attributes: ctypes.Structure) -> int:
    """Return 0, or the error number."""
    pointer, size = ctypes.byref(attributes), ctypes.sizeof(attributes)
    return 0 if _libc.syscall(_SYS_BPF, command, pointer, size) == 0 else ctypes.get_errno()


def _check(failure: int) -> None:
    if failure:
        raise OSError(failure, f"bpf: {os.strerror(failure)}")


def possible_cpus() -> int:
    """Return how many values an entry of a per-CPU map has."""
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as file:
        ranges = [part.split("-") for part in file.read().split(",")]
    return sum(int(cpus[-1]) - int(cpus[0]) + 1 for cpus in ranges)


class BpfMap:
    """One map, with keys and values of fixed types. Values of per-CPU maps are 8 bytes times n."""

    def __init__(self, descriptor: int, key: Any, value: Any, per_cpu: bool = False) -> None:
        """Take a map by its descriptor, which stays the caller's."""
        self._descriptor = descriptor
        self._key, self._value = np.dtype(key), np.dtype(value)
        self._values_each = possible_cpus() if per_cpu else 1
        # Of single entries, made once: to make them takes longer than the call.
        self._one_key = np.zeros(1, self._key)
        self._one_value = np.zeros(self._values_each, self._value)
        self._element = _Element(map_fd=descriptor, key=self._one_key.ctypes.data)

    def read(self, key: int) -> Array:
        """Return the values of one entry, one for each CPU. Raises OSError: ENOENT, no such key."""
        _check(self._one(_LOOKUP, key))
        return self._one_value.copy()

    def write(self, key: int, value: Any) -> None:
        """Set the value of one entry. Raises OSError: E2BIG, the map is full."""
        self._one_value[0] = value
        _check(self._one(_UPDATE, key))

    def delete(self, key: int) -> None:
        """Drop one entry, if it is there."""
        failure = self._one(_DELETE, key)
        _check(0 if failure == errno.ENOENT else failure)

    def take(self) -> tuple[Array, Array]:
        """Take all entries out: keys, shape (n,), and values, shape (n, CPUs).

        Exact only while no program writes to the map.
        """
        keys, values = [np.zeros(0, self._key)], [np.zeros((0, self._values_each), self._value)]
        position, attributes = ctypes.c_uint32(), _Batch(map_fd=self._descriptor)
        attributes.out_batch = ctypes.addressof(position)
        failure = 0
        while not failure:
            some = np.zeros(_BATCH_ENTRIES, self._key)
            theirs = np.zeros((_BATCH_ENTRIES, self._values_each), self._value)
            attributes.keys, attributes.values = some.ctypes.data, theirs.ctypes.data
            attributes.count = _BATCH_ENTRIES
            failure = _bpf(_LOOKUP_AND_DELETE_BATCH, attributes)
            if failure not in (0, errno.ENOENT):  # the latter: these were the last
                _check(failure)
            keys.append(some[: attributes.count])
            values.append(theirs[: attributes.count])
            attributes.in_batch = ctypes.addressof(position)
        return np.concatenate(keys), np.concatenate(values)

    def _one(self, command: int, key: int) -> int:
        self._one_key[0] = key
        # What a command does not use has to be zero.
        self._element.value = 0 if command == _DELETE else self._one_value.ctypes.data
        return _bpf(command, self._element)
