# SPDX-License-Identifier: MIT
"""The kernel module, as Python sees it: INFO, CHECKSUM, MERGE and UNMERGE over netlink.

What each command means, and what the kernel promises, is told in kmod/uapi/mergemem.h. Here
stand only its Python face and the names of its errors. Example:

    with Module() as module:
        process = ProcFs().process(pid).id
        for run in module.checksum(process, address, pages):
            print(hex(run.address), run.records["state"])
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from mergemem_agent import contract, error
from mergemem_agent.contract import (
    PAGE_BYTES,
    Attribute,
    Command,
    Feature,
    MergeFlag,
    ProcessFlag,
    Result,
)
from mergemem_agent.error import MergememError
from mergemem_agent.info import Counters, Info, Limits, Totals
from mergemem_agent.netlink import (
    FamilyMissing,
    GenericNetlink,
    NetlinkFailure,
    Reply,
    attributes_of,
    number_of,
    text_of,
)
from mergemem_agent.procfs import ProcessId

Array = np.ndarray[Any, np.dtype[Any]]

# One dump request covers at most this much, so that its answer takes at most 256 KiB, and a
# signal is noticed after some 10 ms of checksums.
PAGES_PER_DUMP: Final = 16384

_SYSFS = Path("/sys/module/mergemem")

_U32: Final = struct.Struct("=I")
_U64: Final = struct.Struct("=Q")

# The attribute of an address, and length and type of the one behind it.
_RUN: Final = struct.Struct("=HHQHH")
_ATTRIBUTE_BYTES: Final = 4
_NO_RECORDS: Final = np.zeros(0, dtype=contract.RECORD)


class ModuleFailure(MergememError):
    """The kernel module refused a request; the message holds its own words."""


class ModuleMissing(ModuleFailure):
    """mergemem.ko is not loaded, or was unloaded since the socket was opened."""


class ContractMismatch(ModuleFailure):
    """The loaded module speaks a version of the contract that this agent does not know."""


class NoSuchProcess(ModuleFailure):
    """The process is gone, or its pid belongs to another one by now (ESRCH)."""


class AccessDenied(ModuleFailure):
    """This process must not be touched: not dumpable, or a security module objects (EACCES)."""


class PermissionDenied(AccessDenied, error.PermissionDenied):
    """The caller may not talk to the module at all: it lacks CAP_SYS_PTRACE (EPERM)."""


class Busy(ModuleFailure):
    """The process could not be locked; try again later (EBUSY)."""


class OutOfMemory(ModuleFailure):
    """Memory does not suffice; nothing was changed (ENOMEM)."""


class BadRequest(ModuleFailure):
    """The request is malformed: a fault of the caller, not of the system."""


_FAILURES: Final[dict[int, tuple[type[ModuleFailure], str]]] = {
    errno.ENOENT: (ModuleMissing, "load it with 'modprobe mergemem'"),
    errno.ESRCH: (NoSuchProcess, ""),
    errno.EACCES: (AccessDenied, "a process that is not dumpable must be allowed by name"),
    errno.EPERM: (PermissionDenied, "this takes CAP_SYS_PTRACE: run as root"),
    errno.EBUSY: (Busy, "try again"),
    errno.ENOMEM: (OutOfMemory, "free some memory, or ask for a smaller range"),
}


class Run(NamedTuple):
    """Neighbouring pages from `address` on, as CHECKSUM saw them.

    Either `records` has one contract.RECORD per page and `refused_pages` is 0, or it is empty
    and `refused_pages` tells how many pages lie in a mapping of a kind that is never merged.
    """

    address: int
    records: Array
    refused_pages: int


@dataclass(frozen=True)
class Unmerged:
    """What one UNMERGE did: pages with frames of their own now, and where to go on."""

    pages: int
    next_address: int


class Module:
    """One open conversation with mergemem.ko, for use by one thread."""

    def __init__(self) -> None:
        """Open it. Raises ModuleMissing, PermissionDenied, ContractMismatch."""
        try:
            self._netlink = GenericNetlink(contract.FAMILY_NAME, contract.CONTRACT_VERSION)
        except FamilyMissing:
            raise _failure(errno.ENOENT, "the kernel module mergemem is not loaded") from None
        try:
            version = self.info().contract_version
            if version != contract.CONTRACT_VERSION:
                raise ContractMismatch(
                    f"the loaded mergemem.ko speaks contract version {version}, "
                    f"this program version {contract.CONTRACT_VERSION}",
                    hint="install module and program of the same release, reload the module",
                )
        except BaseException:
            self.close()
            raise

    @staticmethod
    def is_loaded() -> bool:
        """Tell whether the module is loaded, without asking for it.

        A netlink look-up of a missing family makes the kernel run modprobe: a polling agent
        would load the module that its operator has just unloaded.
        """
        return _SYSFS.is_dir()

    def close(self) -> None:
        """Close the socket. Merged pages stay merged."""
        self._netlink.close()

    def __enter__(self) -> Module:
        """Return the module; leaving the block closes it."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the socket."""
        self.close()

    def info(self) -> Info:
        """Versions, limits, counters and live totals. Raises ModuleMissing, PermissionDenied."""
        reply = self._do(Command.INFO)
        return Info(
            contract_version=_number(reply, Attribute.CONTRACT_VERSION),
            module_version=text_of(reply.get(Attribute.MODULE_VERSION)),
            features=Feature(_number(reply, Attribute.FEATURES, absent=0)),
            limits=Limits(**_structure(reply, Attribute.LIMITS, contract.LIMITS)),
            counters=_counters(_structure(reply, Attribute.COUNTERS, contract.COUNTERS)),
            totals=Totals(**_structure(reply, Attribute.TOTALS, contract.TOTALS)),
        )

    def checksum(
        self,
        process: ProcessId,
        address: int,
        pages: int,
        depth_bytes: int = contract.DEPTH_FULL_BYTES,
        undumpable: bool = False,
        full: Array | None = None,
    ) -> Iterator[Run]:
        """Yield what is mapped in `pages` pages from `address`, in ascending order.

        Of each page `depth_bytes` enter the checksum; 0: none is read. With `full`, a bool for
        each page, those set are read in full, and of the others merged pages are not read at all.
        Pages of which no run tells are absent. Raises NoSuchProcess, AccessDenied, Busy.
        """
        end = address + pages * PAGE_BYTES
        named = _processes([process], {process} if undumpable else ())
        for start in range(address, end, PAGES_PER_DUMP * PAGE_BYTES):
            first, count = (start - address) // PAGE_BYTES, (end - start) // PAGE_BYTES
            count = min(PAGES_PER_DUMP, count)
            request = [
                (Attribute.PROCESSES, named),
                _u64(Attribute.ADDRESS, start),
                _u64(Attribute.PAGES, count),
                _u32(Attribute.DEPTH, depth_bytes),
            ]
            if full is not None:
                bitmap = np.packbits(full[first : first + count], bitorder="little").tobytes()
                request.append((Attribute.FULL_PAGES, bitmap))
            try:
                runs = self._netlink.dump(Command.CHECKSUM, request, _run)
            except NetlinkFailure as failure:
                raise _translate(failure) from None
            yield from runs

    def merge(
        self,
        processes: Sequence[ProcessId],
        candidates: Array,
        undumpable: Collection[ProcessId] = (),
        any_node: bool = False,
        split_percent: int | None = None,
    ) -> Array:
        """Merge the pages of each group; return one uint8 Result per candidate, in order.

        `candidates` is an array of contract.CANDIDATE whose `process` is an index into
        `processes`. Both must keep to the limits that info() tells. With `any_node`, pages of
        different NUMA nodes may share a frame. A huge page is split if `split_percent` of its
        pages are in the request and equal to their groups; None: none is.
        """
        # What comes sorted costs the kernel no sorting.
        order = np.lexsort((candidates["address"], candidates["process"]))
        attributes = [
            (Attribute.PROCESSES, _processes(processes, undumpable)),
            (Attribute.CANDIDATES, _packed(candidates.take(order), contract.CANDIDATE)),
        ]
        if any_node:
            attributes.append(_u32(Attribute.FLAGS, MergeFlag.ANY_NODE))
        if split_percent is not None:
            attributes.append(_u32(Attribute.SPLIT_PERCENT, split_percent))
        reply = self._do(Command.MERGE, *attributes)
        results = np.empty(len(candidates), dtype=contract.RESULT)
        results[order] = _array(reply, Attribute.RESULTS, contract.RESULT)
        return results

    def unmerge(
        self,
        process: ProcessId,
        address: int,
        pages: int,
        undumpable: bool = False,
        count_only: bool = False,
    ) -> Unmerged:
        """Give the merged pages of a range private frames again, as many as one request may.

        Go on at `next_address` until that is the end of the range. With `count_only` nothing is
        changed: the merged pages are only counted. Raises NoSuchProcess, AccessDenied, Busy, and
        OutOfMemory before anything was changed.
        """
        attributes = [
            (Attribute.PROCESSES, _processes([process], {process} if undumpable else ())),
            _u64(Attribute.ADDRESS, address),
            _u64(Attribute.PAGES, pages),
        ]
        if count_only:
            attributes.append((Attribute.COUNT_ONLY, b""))
        reply = self._do(Command.UNMERGE, *attributes)
        return Unmerged(
            pages=_number(reply, Attribute.UNMERGED),
            next_address=_number(reply, Attribute.NEXT),
        )

    def _do(self, command: Command, *attributes: tuple[int, bytes]) -> Reply:
        try:
            reply = self._netlink.do(command, attributes)
        except NetlinkFailure as failure:
            raise _translate(failure) from None
        if reply is None:
            raise BadRequest(f"the module did not answer {command.name}")
        return reply


def _translate(failure: NetlinkFailure) -> ModuleFailure:
    if failure.code == errno.ENOENT and not failure.text:
        # What generic netlink itself says of a family number that is no longer taken. Numbers
        # are given out in turn, so another family does not take this one's soon.
        return _failure(errno.ENOENT, "the kernel module mergemem was unloaded")
    return _failure(failure.code, f"the kernel module says: {failure.message}")


def _failure(code: int, message: str) -> ModuleFailure:
    kind, hint = _FAILURES.get(code, (BadRequest, ""))
    return kind(message, hint=hint)


def _u32(attribute: Attribute, value: int) -> tuple[Attribute, bytes]:
    return attribute, _U32.pack(value)


def _u64(attribute: Attribute, value: int) -> tuple[Attribute, bytes]:
    return attribute, _U64.pack(value)


def _processes(processes: Sequence[ProcessId], undumpable: Collection[ProcessId]) -> bytes:
    entries = [
        (
            process.pid,
            ProcessFlag.UNDUMPABLE if process in undumpable else 0,
            process.start_time_ticks,
        )
        for process in processes
    ]
    return np.array(entries, dtype=contract.PROCESS).tobytes()


def _packed(values: Array, dtype: np.dtype[Any]) -> bytes:
    if values.dtype != dtype:
        raise TypeError(f"an array of {dtype} is needed, not of {values.dtype}")
    return values.tobytes()


def _number(reply: Reply, attribute: Attribute, absent: int | None = None) -> int:
    """Read a number; `absent` stands for one that is not there. Raises ContractMismatch."""
    value = reply.get(attribute)
    if value is not None:
        return number_of(value)
    if absent is None:
        raise ContractMismatch(f"the module's answer lacks {attribute.name}")
    return absent


def _array(reply: Reply, attribute: Attribute, dtype: np.dtype[Any]) -> Array:
    """Return an array as a view of what was received; an empty one if there is none."""
    return np.frombuffer(reply.get(attribute, b""), dtype=dtype)


def _structure(reply: Reply, attribute: Attribute, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Read one structure: fields that an older module does not send are 0, newer ones unread."""
    received = bytes(reply.get(attribute, b""))[: dtype.itemsize]
    value = np.frombuffer(received.ljust(dtype.itemsize, b"\0"), dtype=dtype)[0]
    return {name: value[name].tolist() for name in dtype.names or ()}


def _counters(fields: dict[str, Any]) -> Counters:
    counts = fields.pop("results")
    return Counters(**fields, results={result: counts[result] for result in Result})


def _run(attributes: memoryview) -> Run:
    """Decode one of the many runs of a dump: in the order that the module has, or in any."""
    if len(attributes) >= _RUN.size:
        _, first, address, size, second = _RUN.unpack_from(attributes)
        value = attributes[_RUN.size : _RUN.size + size - _ATTRIBUTE_BYTES]
        if first == Attribute.ADDRESS and second == Attribute.RECORDS:
            return Run(address, np.frombuffer(value, contract.RECORD), 0)
        if first == Attribute.ADDRESS and second == Attribute.REFUSED:
            return Run(address, _NO_RECORDS, number_of(value))
    reply = attributes_of(attributes)
    return Run(
        address=_number(reply, Attribute.ADDRESS),
        records=_array(reply, Attribute.RECORDS, contract.RECORD),
        refused_pages=_number(reply, Attribute.REFUSED, absent=0),
    )
