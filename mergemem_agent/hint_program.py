# SPDX-License-Identifier: MIT
"""The BPF program of bpf/hints.c: compiled, loaded and attached, with its maps.

BCC brings a C compiler into this process, which is why only `mergemem agent` imports this module,
once, and why most of that memory is given back right after.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from mergemem_agent.bpf_map import BpfMap
from mergemem_agent.error import MergememError
from mergemem_agent.hint import SourceKind
from mergemem_agent.host import Host

# Entries of each of the two maps of counts, each 8 bytes per CPU and some 80 besides: a drain
# every second finds those regions in which anything was written, and 32 GiB of them are enough.
REGIONS: Final = 16384
TARGETS: Final = 16384
EVENT_PAGES: Final = 64  # 10,922 events

# At most one fault in 32 is counted: 16 for the 512 pages of a region.
SAMPLING_BITS: Final = 5

# Of the software event. It counts by itself, so N is fixed; even so, a million faults each second
# stay below the rate at which the kernel begins to drop samples (400 a tick).
PERF_SAMPLING: Final = 64

FAULT_TRACEPOINTS: Final = (b"page_fault_user", b"page_fault_kernel")

SETTINGS: Final = np.dtype(
    [(name, "u4") for name in ("epoch", "salt", "highest", "pid_offset", "copy_of", "wake")]
)
TASK_BYTES: Final = 8192
COUNTS: Final = np.dtype([("first_touches", "u4"), ("write_protect_faults", "u4")])
TOTALS: Final = np.dtype(
    [("sampled", "u8"), ("counted", "u8", (2,)), ("failed", "u8"), ("events_lost", "u8")]
)

EVENT_FORK, EVENT_EXEC, EVENT_EXIT, EVENT_COUNTED = range(4)  # enum event_kind

_INITIAL_PID_NAMESPACE: Final = 0xEFFFFFFC  # include/linux/proc_ns.h
_COPY_SECONDS: Final = 5.0
# PERF_TYPE_SOFTWARE, PERF_COUNT_SW_PAGE_FAULTS of include/uapi/linux/perf_event.h
_PAGE_FAULTS: Final = {"ev_type": 1, "ev_config": 2}
_MADV_PAGEOUT: Final = 21
# What is needed once, to compile and to load.
_LIBRARIES: Final = re.compile(r"/(libLLVM|libclang|libbcc|libelf)[^/]*$")


class NoProgram(MergememError):
    """There can be no hints here; the message says why."""


class HintProgram:
    """The loaded program. Its end, or this process's, takes it out of the kernel."""

    def __init__(
        self,
        *,
        regions: int = REGIONS,
        event_pages: int = EVENT_PAGES,
        sampling_bits: int = SAMPLING_BITS,
    ) -> None:
        """Compile, load, and report events; takes a second or so. Raises NoProgram."""
        sizes = {"REGIONS": regions, "TARGETS": TARGETS, "EVENT_PAGES": event_pages}
        sizes["SAMPLING_BITS"] = sampling_bits
        self.least_sampling = 1 << sampling_bits
        self.kind = SourceKind.PROC  # until count_faults()
        self.perf_sampling = PERF_SAMPLING
        self._bpf: Any = _compile(sizes)
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        """Report events, and find all maps."""
        self._attach("raw_tracepoint", tp=b"task_newtask", fn_name=b"on_fork")
        self._attach("raw_tracepoint", tp=b"sched_process_exec", fn_name=b"on_exec")
        self._attach("raw_tracepoint", tp=b"sched_process_exit", fn_name=b"on_exit")
        self._events: list[tuple[int, int]] = []
        self._bpf[b"events"].open_ring_buffer(self._take_event)
        self.events_descriptor = self._descriptor("events")
        self.settings = BpfMap(self._descriptor("settings"), "u4", SETTINGS)
        self._pid_offset = self._find_pid_offset()
        self.totals = BpfMap(self._descriptor("totals"), "u4", TOTALS, per_cpu=True)
        self.targets = BpfMap(self._descriptor("targets"), "u4", "u4")
        self.counts = tuple(
            BpfMap(self._descriptor(f"counts_{parity}"), "u8", COUNTS, per_cpu=True)
            for parity in ("even", "odd")
        )

    def configure(self, epoch: int, salt: int, highest: int, wake: bool = False) -> None:
        """Say which map is written to, and which faults are counted: see bpf/sample.h.

        With `wake`, the next one that is counted is an event, too.
        """
        self.settings.write(0, (epoch, salt, highest, self._pid_offset, 0, wake))

    def _find_pid_offset(self) -> int:
        """Return where struct task_struct has the pid, with that of the process behind it.

        Its header would take longer to compile than all the rest. So a thread of this process is
        copied as it ends, and its two pids looked for.
        """
        copy = BpfMap(self._descriptor("task_copy"), "u4", f"V{TASK_BYTES}")
        self.settings.write(0, (0, 0, 0, 0, os.getpid(), 0))
        thread = threading.Thread(target=lambda: None, name="pid offset")
        thread.start()
        pids = (thread.native_id, os.getpid())
        thread.join()
        deadline = time.monotonic() + _COPY_SECONDS
        while time.monotonic() < deadline:  # it is gone for Python before it is for the kernel
            words = np.frombuffer(copy.read(0).tobytes(), np.uint32)
            places = np.flatnonzero((words[:-1] == pids[0]) & (words[1:] == pids[1]))
            if len(places) == 1:
                copy.write(0, bytes(TASK_BYTES))  # the rest of it is nobody's business
                return int(places[0]) * 4
            time.sleep(0.01)
        raise NoProgram("the kernel does not let the program see the pids of new processes")

    def count_faults(self, kind: SourceKind, perf_sampling: int = PERF_SAMPLING) -> None:
        """Count page faults from now on. Raises NoProgram where that way does not exist."""
        if kind is SourceKind.PERF:
            self._attach(
                "perf_event", **_PAGE_FAULTS, fn_name=b"on_perf_fault", sample_period=perf_sampling
            )
        else:
            self._tail_call("sampled", b"on_sampled_fault")
            with contextlib.ExitStack() as attached:
                for tracepoint in FAULT_TRACEPOINTS:
                    self._attach("raw_tracepoint", tp=tracepoint, fn_name=b"on_fault")
                    attached.callback(self._bpf.detach_raw_tracepoint, tp=tracepoint)
                attached.pop_all()  # or none of them stays, and nothing is counted twice
        self.kind, self.perf_sampling = kind, perf_sampling

    def stop_counting(self) -> None:
        """Leave page faults alone; events go on."""
        if self.kind is SourceKind.PERF:
            self._bpf.detach_perf_event(**_PAGE_FAULTS)
        elif self.kind is SourceKind.BPF:
            for tracepoint in FAULT_TRACEPOINTS:
                self._bpf.detach_raw_tracepoint(tp=tracepoint)
        self.kind = SourceKind.PROC

    def take_events(self) -> list[tuple[int, int]]:
        """Return kind and pid of all events that have come since the last time."""
        self._bpf.ring_buffer_consume()
        events, self._events = self._events, []
        return events

    def _take_event(self, _: object, data: int, size: int) -> None:
        kind, pid = np.frombuffer(ctypes.string_at(data, size), "u4", 2)
        self._events.append((int(kind), int(pid)))

    def missed(self) -> tuple[int, int]:
        """Return how often the kernel did not run the programs: of faults, of events.

        It does not while another program, or the change of a map, was interrupted on that CPU.
        """
        functions = self._bpf.funcs.items()
        counts = {name.decode(): _misses(function.fd) for name, function in functions}
        faults = sum(counts.pop(name, 0) for name in ("on_fault", "on_perf_fault"))
        return faults, sum(counts.values())

    def close(self) -> None:
        """Take the program out of the kernel."""
        self._bpf.cleanup()

    def _attach(self, to: str, **arguments: Any) -> None:
        try:
            getattr(self._bpf, f"attach_{to}")(**arguments)
        except Exception as failure:  # BCC raises nothing more precise
            what = arguments.get("tp", b"page faults").decode()
            raise NoProgram(f"the kernel refuses the BPF program for {what}: {failure}") from None

    def _tail_call(self, table: str, function: bytes) -> None:
        loaded = self._bpf.load_func(function, self._bpf.RAW_TRACEPOINT)
        BpfMap(self._descriptor(table), "u4", "u4").write(0, loaded.fd)

    def _descriptor(self, table: str) -> int:
        return int(self._bpf[table.encode()].get_fd())


def source_directory() -> Path:
    """Return where the C files are: in the installed package, or in the checkout."""
    package = Path(__file__).parent
    for directory in (package / "bpf", package.parent / "bpf"):
        if (directory / "hints.c").exists():
            return directory
    raise NoProgram("hints.c is not installed", f"it belongs into {package / 'bpf'}")


def _compile(sizes: Mapping[str, int]) -> Any:
    missing = missing_capabilities()
    if missing:  # before BCC is there, which is large and cannot help it
        raise NoProgram(f"this process lacks {' and '.join(missing)}")
    if os.stat("/proc/self/ns/pid").st_ino != _INITIAL_PID_NAMESPACE:
        raise NoProgram(
            "this is a pid namespace of its own, and the kernel would tell pids of the host",
            "run the agent on the host, or in a container that shares its pid namespace",
        )
    try:
        from bcc import BPF
    except ImportError as failure:
        raise NoProgram(
            f"BCC cannot be imported: {failure}",
            "apt install python3-bpfcc, and run mergemem with /usr/bin/python3 or a virtual "
            "environment made by it with --system-site-packages",
        ) from None
    directory = source_directory()
    flags = [f"-I{directory}", *(f"-DMERGEMEM_{name}={value}" for name, value in sizes.items())]
    try:
        # -w: older compilers warn of newer kernels' headers, and not of anything of ours.
        return BPF(src_file=os.fsencode(directory / "hints.c"), cflags=[*flags, "-w"])
    except Exception as failure:  # BCC raises nothing more precise
        raise NoProgram(
            f"the BPF program cannot be loaded: {failure}",
            "it takes CAP_BPF and CAP_PERFMON, and the headers of the running kernel",
        ) from None


def missing_capabilities() -> list[str]:
    """Return what this process may not do, of what it takes."""
    had = Host().capabilities
    needed = ("CAP_BPF", "CAP_PERFMON")
    return [] if "CAP_SYS_ADMIN" in had else [name for name in needed if name not in had]


def _misses(descriptor: int) -> int:
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as file:
        match = re.search(r"^recursion_misses:\s*(\d+)$", file.read(), re.MULTILINE)
    return int(match[1]) if match else 0


def give_memory_back() -> None:
    """Give the kernel the memory back that only the compiler had needed.

    Pages of its libraries that are never used again cost nothing but address space; should one be
    used all the same, it is read from the file again.
    """
    gc.collect()  # what BCC's Python part has left in circles keeps whole arenas
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    with open("/proc/self/maps", encoding="utf-8") as file:
        for line in file:
            fields = line.split(None, 5)
            if len(fields) == 6 and _LIBRARIES.search(fields[5].rstrip()):
                start, end = (int(word, 16) for word in fields[0].split("-"))
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)
