# SPDX-License-Identifier: MIT
"""ksmd in its settings: as it comes, with its advisor, and flat out."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.bench import ksmd
from tests.bench.race.cases import ADVISOR, DEFAULTS, FLAT_OUT, HELD_PERCENT, KSMD_HELD
from tests.bench.race.contestant import Contestant

UNMERGE = "2"
# Defaults as the kernel has them (mm/ksm.c).
AS_IT_COMES = {"pages_to_scan": "100", "sleep_millisecs": "20"}
SETTINGS: Mapping[str, Mapping[str, str]] = {
    DEFAULTS: AS_IT_COMES,
    ADVISOR: AS_IT_COMES | {"advisor_mode": "scan-time"},
    FLAT_OUT: {"pages_to_scan": str(ksmd.ALL_PAGES), "sleep_millisecs": "0"},
}
# Better than their defaults; on every kernel that has them.
WHERE_THEY_EXIST = {"smart_scan": "1", "use_zero_pages": "1"}
SLABS = ("ksm_rmap_item", "ksm_stable_node", "ksm_mm_slot")
CGROUPS = Path("/sys/fs/cgroup")
HELD = CGROUPS / "race.ksmd"
PERIOD_US = 100_000
REST_SECONDS = 0.5
UNMERGE_SECONDS = 60.0


def opt_in() -> str:
    """How processes ask for KSM on this kernel: prctl() came with 6.4."""
    major, minor = map(int, os.uname().release.split(".")[:2])
    return "prctl" if (major, minor) >= (6, 4) else "madvise"


def is_there(name: str) -> bool:
    """Whether this kernel has what a contestant needs."""
    return name != ADVISOR or (ksmd.CONTROLS / "advisor_mode").exists()


class Ksm(Contestant):
    """ksmd with one set of settings."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.opt_in = opt_in()
        self.pid = ksmd.find()
        self._held = name == KSMD_HELD
        settings = SETTINGS[FLAT_OUT if self._held else name]
        if name != DEFAULTS:
            there = {n: v for n, v in WHERE_THEY_EXIST.items() if (ksmd.CONTROLS / n).exists()}
            settings = {**settings, **there}
        self._settings = settings

    def start(self) -> dict[str, Any]:
        self._before = {name: ksmd.get(name) for name in self._settings}
        if "advisor_mode" in self._before:  # what is chosen is in brackets
            self._before["advisor_mode"] = "none"
        for name, value in self._settings.items():
            ksmd.put(name, value)
        if self._held:
            self._hold()
        # Without a process that has opted in, it sleeps.
        ksmd.put("run", ksmd.MERGE)
        time.sleep(REST_SECONDS)
        return {"settings": dict(self._settings)}

    def account(self) -> dict[str, Any]:
        counters = {
            path.name: int(path.read_text())
            for path in ksmd.CONTROLS.iterdir()
            if path.name.startswith(("pages_", "full_scans", "ksm_zero", "stable_"))
            and path.stat().st_mode & 0o444
        }
        slabs = _slabs()
        return {
            "counters": counters,
            "slabs": slabs,
            "metadata_bytes": sum(slabs.values()),
            # A kernel thread has but a stack.
            "scanner_bytes": 0,
        }

    def stop(self) -> None:
        ksmd.put("run", UNMERGE)
        deadline = time.monotonic() + UNMERGE_SECONDS
        while int(ksmd.get("pages_shared")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"ksmd keeps its pages for more than {UNMERGE_SECONDS:.0f} s")
            time.sleep(REST_SECONDS)
        ksmd.put("run", ksmd.STOP)
        if "advisor_mode" in self._before:
            ksmd.put("advisor_mode", self._before["advisor_mode"])
        for name, value in self._before.items():
            if name != "advisor_mode":
                ksmd.put(name, value)
        if self._held:
            (CGROUPS / "cgroup.procs").write_text(str(self.pid))
            HELD.rmdir()

    def _hold(self) -> None:
        """At most so much of a core, by the scheduler: exact, whatever its settings."""
        (CGROUPS / "cgroup.subtree_control").write_text("+cpu")
        HELD.mkdir(exist_ok=True)
        (HELD / "cpu.max").write_text(f"{PERIOD_US * HELD_PERCENT // 100} {PERIOD_US}")
        (HELD / "cgroup.procs").write_text(str(self.pid))


def _slabs() -> dict[str, int]:
    """What KSM's objects take, whole slabs; the guest boots with slab_nomerge for that."""
    found = {}
    text = Path("/proc/slabinfo").read_text(encoding="ascii")
    for name in SLABS:
        # name <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab> … <num_slabs> <…>
        line = re.search(
            rf"^{name} +\d+ +\d+ +\d+ +\d+ +(\d+) .*: slabdata +\d+ +(\d+)", text, re.MULTILINE
        )
        if not line:
            raise RuntimeError(f"/proc/slabinfo has no {name}: was slab_nomerge forgotten?")
        found[name] = int(line[1]) * int(line[2]) * 4096
    return found
