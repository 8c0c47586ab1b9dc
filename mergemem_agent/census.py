# SPDX-License-Identifier: MIT
"""The census: how many page frames of running processes hold equal bytes, without the module.

    selection ─► mappings ─► pagemap ─► bytes ─► pagemap again ─► checksum ─► records ─► tally
                 (smaps)      frames,    mem      same page        128 bits    24 bytes
                              kinds               still?                       a page

It counts what mergemem.ko can merge, by the rules of the module: small anonymous pages in private
anonymous mappings, within one trust domain and one real user. It cannot see which pages are in
use by I/O at this moment; the module leaves those.

Memory: 24 bytes for each resident page of each process, and the working space of shelf.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergemem_agent import explain, resident, tally
from mergemem_agent.checksum import Checksum
from mergemem_agent.error import MergememError, PermissionDenied, ProcessGone
from mergemem_agent.gap import Gap, Limit, Unread
from mergemem_agent.pagemap import (
    EXCLUSIVE,
    FRAME_MASK,
    NO_FLAGS,
    PAGE_BYTES,
    AddressSpace,
    FrameFlag,
    FrameTable,
    Kind,
    frame_numbers_visible,
    kinds_of,
    open_frame_table,
    untrue_flags,
)
from mergemem_agent.policy import Policy, Selector
from mergemem_agent.procfs import Mapping, Process, ProcFs
from mergemem_agent.resident import Batch
from mergemem_agent.shelf import Shelf
from mergemem_agent.tally import Tally

MAX_PROCESSES = 1 << tally.PROCESS_BITS


@dataclass(frozen=True)
class Member:
    """A process of the selection, and the trust domain that its policy puts it in."""

    process: Process
    domain: str
    include_undumpable: bool = False


@dataclass(frozen=True)
class DomainCensus:
    """One trust domain: the figures of `tally`, and what they do not cover.

    The module never lets different real users share pages unless it was loaded with
    allow_cross_uid=1, so a domain with several users counts as one for each; `uid` is None where
    users may share. `zero_page_mappings` are page-table entries of the kernel's page of zeros,
    which takes no frame. `error_duplicates` is the half-width of the 95 % confidence interval of
    `tally.mergeable_duplicates`, 0 unless a sample was taken.
    """

    domain: str
    uid: int | None
    pids: tuple[int, ...]
    tally: Tally
    zero_page_mappings: int
    error_duplicates: int


@dataclass(frozen=True)
class Census:
    """The whole count. `sample` is the part of contents it rests on, 1.0 for all.

    `frames_in_several_domains` is by how much the sum of `frames` over the domains exceeds the
    frames there are: fork leaves frames that processes of two domains map.
    """

    domains: tuple[DomainCensus, ...]
    gaps: tuple[Gap, ...]
    limits: frozenset[Limit]
    sample: float
    frames_in_several_domains: int

    @property
    def total(self) -> Tally:
        """All domains together, each frame once."""
        total = sum((domain.tally for domain in self.domains), Tally())
        twice = Tally(
            frames=-self.frames_in_several_domains, shared=-self.frames_in_several_domains
        )
        return total + twice

    @property
    def zero_page_mappings(self) -> int:
        """Page-table entries of the kernel's page of zeros, over all domains."""
        return sum(domain.zero_page_mappings for domain in self.domains)

    @property
    def error_duplicates(self) -> int:
        """Half-width of the 95 % confidence interval of the total's duplicates."""
        return round(math.hypot(*(domain.error_duplicates for domain in self.domains)))


# Called after each batch with the bytes that are done and the bytes there are, roughly.
Progress = Callable[[int, int], None]


def members(pids: Sequence[int], proc: ProcFs | None = None) -> list[Member]:
    """Return processes in the domains that the default policy puts them in: user and container.

    Raises ProcessGone for a pid that no process has.
    """
    proc = proc or ProcFs()
    policy = Policy(name="", select=Selector())
    found = []
    for pid in dict.fromkeys(pids):
        process = proc.process(pid)
        if process is None:
            raise ProcessGone(f"there is no process {pid}", "see ps(1) for those there are")
        found.append(Member(process, policy.domain_of(process)))
    return found


def take(
    selection: Sequence[Member],
    *,
    sample: float = 1.0,
    allow_cross_uid: bool = False,
    progress: Progress | None = None,
    proc_root: Path = Path("/proc"),
) -> Census:
    """Take a census of the processes in `selection`, while they run and without changing them.

    With a `sample` below 1, contents are drawn with that probability, each with all of its pages,
    so that duplicates stay together; figures are extrapolated, and every byte is read all the
    same. Raises MergememError for a selection or sample that cannot be.
    """
    if not 0 < sample <= 1:
        raise MergememError(
            f"a sample of {sample:.4g} cannot be taken", "take more than 0, up to 1"
        )
    if len(selection) > MAX_PROCESSES:
        raise MergememError(f"{len(selection)} processes are too many for one census")
    with ExitStack() as stack:
        taker = _Taker(sample, proc_root, stack)
        total_bytes = sum(member.process.anonymous_bytes for member in selection)
        for number, member in enumerate(selection):
            key = (member.domain, None if allow_cross_uid else member.process.uid)
            shelf = taker.shelves.setdefault(key, Shelf())
            for _ in taker.add(number, member, shelf):
                if progress:
                    progress(taker.read_pages * PAGE_BYTES, total_bytes)
        return taker.census()


def _ksm_has_merged() -> bool:
    try:
        return int(Path("/sys/kernel/mm/ksm/pages_shared").read_text(encoding="ascii")) > 0
    except OSError:
        return False


class _Taker:
    """A census in the making."""

    def __init__(self, sample: float, proc_root: Path, stack: ExitStack) -> None:
        self.shelves: dict[tuple[str, int | None], Shelf] = {}
        self.read_pages = 0
        self._sample = sample
        self._proc_root = proc_root
        self._proc = ProcFs(proc_root)
        self._gaps: dict[tuple[int, Unread, str], int] = {}
        self._limits: set[Limit] = set()
        self._checksum = Checksum()
        self._frame_numbers = frame_numbers_visible()
        self._flags = self._table("kpageflags", Limit.FRAME_FLAGS, stack)
        self._counts = self._table("kpagecount", Limit.MAPPING_COUNTS, stack)
        self._untrue_flags = untrue_flags(self._flags) if self._flags else NO_FLAGS
        if not self._frame_numbers:
            self._limits.add(Limit.FRAME_NUMBERS)
        if FrameFlag.KSM in self._untrue_flags and _ksm_has_merged():
            self._limits.add(Limit.KSM_FLAG)

    def _table(self, name: str, limit: Limit, stack: ExitStack) -> FrameTable | None:
        # Both tables go by frame number: without those they say nothing.
        table = open_frame_table(self._proc_root / name) if self._frame_numbers else None
        if table is None:
            self._limits.add(limit)
        else:
            stack.callback(table.close)
        return table

    def add(self, number: int, member: Member, shelf: Shelf) -> Iterator[None]:
        """Read one process; yield after each batch."""
        pid = member.process.id.pid
        try:
            if (reason := self._refused(member)) is not None:
                self._gaps[pid, reason, ""] = 0
                return
            with AddressSpace(pid, self._proc_root) as space:
                # Now that the memory is held, make sure whose it is.
                now = self._proc.process(pid)
                if now is None or now.id != member.process.id:
                    raise ProcessGone(f"process {pid} ended")
                shelf.pids.append(pid)
                for mapping in self._proc.mappings(pid, with_flags=True):
                    if mapping.anonymous:
                        yield from self._add_mapping(number, pid, space, mapping, shelf)
        except ProcessGone:
            self._gaps[pid, Unread.GONE, ""] = 0
        except (PermissionDenied, PermissionError):
            self._gaps[pid, Unread.DENIED, ""] = 0
            self._limits.add(Limit.PROCESSES)

    def _refused(self, member: Member) -> Unread | None:
        if member.process.kernel_thread:
            return Unread.KERNEL_THREAD
        if not member.include_undumpable and self._proc.dumpable(member.process.id.pid) is False:
            return Unread.NOT_DUMPABLE
        return None

    def _add_mapping(
        self, number: int, pid: int, space: AddressSpace, mapping: Mapping, shelf: Shelf
    ) -> Iterator[None]:
        refusal = "; ".join(explain.refusals(mapping))
        for window in resident.windows(space, mapping):
            if refusal:
                self._gap(pid, Unread.REFUSED, len(window.present), refusal)
                continue
            self._gap(pid, Unread.SWAPPED, window.swapped_pages)
            for batch in resident.batches(space, window):
                self._gap(pid, Unread.FAILED, batch.failed_pages)
                self._gap(pid, Unread.CHANGED, batch.changed_pages)
                self._store(number, batch, shelf)
                # The next one is for whoever waits for this CPU.
                os.sched_yield()
                yield

    def _gap(self, pid: int, reason: Unread, pages: int, detail: str = "") -> None:
        if pages:
            key = (pid, reason, detail)
            self._gaps[key] = self._gaps.get(key, 0) + pages

    def _store(self, number: int, batch: Batch, shelf: Shelf) -> None:
        self.read_pages += len(batch.numbers)
        low, high = self._checksum.of(batch.contents)
        zero = (low | high) == 0
        exclusive = (batch.entries & EXCLUSIVE) != 0
        frames = batch.entries & FRAME_MASK
        flags = self._flags.values(frames) if self._flags else None
        kinds = kinds_of(batch.entries, flags, self._untrue_flags)
        if self._flags is None:
            kinds[zero & ~exclusive] = Kind.ZERO_PAGE
        if not self._frame_numbers:
            frames = shelf.stand_in_frames(batch.numbers, exclusive)
        zero_page = kinds == Kind.ZERO_PAGE
        shelf.zero_page_mappings += int(zero_page.sum())
        # The draw is by content, so that equal pages are in or out together. Zeros, of checksum 0,
        # are always in: their number stays exact.
        drawn = (high >> np.uint64(32)) < np.uint64(math.ceil(self._sample * 2**32))
        kept = drawn & ~zero_page
        shelf.put(
            tally.pack(low[kept], high[kept], frames[kept], number, exclusive[kept], kinds[kept])
        )

    def census(self) -> Census:
        """Count what was read."""
        counts = self._counts.values if self._counts else None
        domains = []
        for (domain, uid), shelf in self.shelves.items():
            if not shelf.pids:
                continue
            zeros, sampled = shelf.count(counts)
            variance = sampled.squares * (1 - self._sample) / self._sample**2
            domains.append(
                DomainCensus(
                    domain=domain,
                    uid=uid,
                    pids=tuple(shelf.pids),
                    tally=zeros + sampled.scaled(1 / self._sample),
                    zero_page_mappings=shelf.zero_page_mappings,
                    error_duplicates=round(1.96 * variance**0.5),
                )
            )
        return Census(
            domains=tuple(domains),
            gaps=tuple(
                Gap(pid, reason, pages, detail)
                for (pid, reason, detail), pages in self._gaps.items()
            ),
            limits=frozenset(self._limits),
            sample=self._sample,
            frames_in_several_domains=self._frames_in_several_domains(),
        )

    def _frames_in_several_domains(self) -> int:
        if not self._frame_numbers or len(self.shelves) < 2:
            return 0
        frames = [shelf.shared_frames() for shelf in self.shelves.values()]
        together = np.concatenate(frames)
        return round((len(together) - len(np.unique(together))) / self._sample)
