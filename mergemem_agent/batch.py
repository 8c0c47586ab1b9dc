# SPDX-License-Identifier: MIT
"""A batch of slices: what the kernel is asked about each, and what was seen in all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mergemem_agent.contract import DEPTH_FULL_BYTES, DEPTH_SAMPLE_BYTES, PAGE_BYTES, RECORD
from mergemem_agent.look import Wanted
from mergemem_agent.module import Module, ModuleFailure, ModuleMissing, PermissionDenied
from mergemem_agent.order import Slice
from mergemem_agent.region import REGION_PAGES, REGION_SHIFT
from mergemem_agent.window import Look, Stretch, Window, blank_records

Array = np.ndarray[Any, np.dtype[Any]]

# numpy copies structures field by field, and bytes at once.
_OPAQUE: Final = np.dtype((np.void, RECORD.itemsize))


@dataclass(frozen=True)
class Looked:
    """What became of a batch."""

    done: list[Slice]
    failed: list[tuple[Slice, ModuleFailure]]
    seen: Look | None  # in all that are done; None: there are none


def look(
    module: Module, batch: Sequence[Slice], max_mappings: int, everything: bool = False
) -> Looked:
    """Have the kernel look at slices, a request for each, and remember what was seen.

    Of each slice are read in full the pages that have a partner, or all, where it goes straight; of
    the others a sample is taken, if that is due. Merged pages are only counted. With `everything`
    all are read in full. Raises ModuleMissing, PermissionDenied; other failures are of one slice.
    """
    policy = batch[0].target.policy
    now = time.monotonic()
    window = Window(_stretches(batch))
    if everything:
        full = np.ones(len(window.rows) * REGION_PAGES, dtype=np.bool_)
    else:
        full = window.wanted_in_full(now, policy.settle_seconds)
    records = blank_records(len(window.rows))
    failed, ends = [], np.cumsum([work.count for work in batch]) * REGION_PAGES
    for work, end in zip(batch, ends.tolist(), strict=True):
        part = slice(end - work.count * REGION_PAGES, end)
        try:
            _read(module, work, None if everything else full[part], records[part])
        except (ModuleMissing, PermissionDenied):
            raise
        except ModuleFailure as failure:
            failed.append((work, failure))
    done = list(batch)
    if failed:
        refused = [work for work, _ in failed]
        done = [work for work in batch if work not in refused]
        if not done:
            return Looked(done, failed, None)
        there = np.repeat([work not in refused for work in batch], np.diff(ends, prepend=0))
        records, full = records[there], full[there]
        window = Window(_stretches(done))
    seen = window.look(
        records,
        now,
        policy.settle_seconds,
        max_mappings,
        Wanted(huge=policy.rules.split_percent is not None, zero=policy.zero_pages),
        full=full,
        sampled=np.repeat([work.sampled for work in done], [work.count for work in done]),
    )
    return Looked(done, failed, seen)


def _stretches(batch: Sequence[Slice]) -> list[Stretch]:
    return [Stretch(work.target.regions, work.first, work.count) for work in batch]


def _read(module: Module, work: Slice, full: Array | None, records: Array) -> None:
    """Fill the records of one slice in. Raises what Module.checksum() raises.

    `full` tells which pages are to be read in full; all are, merged ones too, if it is None. Where
    the slice goes straight, all others are, which `full` tells afterwards.
    """
    target = work.target
    depth_bytes = DEPTH_SAMPLE_BYTES if work.sampled else 0
    if full is None or work.straight:
        depth_bytes = DEPTH_FULL_BYTES
    room = records.view(_OPAQUE)
    address = int(target.regions.rows["number"][work.first]) << REGION_SHIFT
    for run in module.checksum(
        target.process,
        address,
        work.count * REGION_PAGES,
        depth_bytes=depth_bytes,
        undumpable=target.policy.include_undumpable,
        full=full,
    ):
        if run.records.size:
            start = (run.address - address) // PAGE_BYTES
            room[start : start + len(run.records)] = run.records.view(_OPAQUE)
    if full is not None and work.straight:
        full[:] = True
