# SPDX-License-Identifier: MIT
"""KVM where a probe boot proves that it works, else emulation (TCG).

/dev/kvm proves nothing: in a nested machine a guest may hang without a word. So a guest is really
booted, with a short limit, and the answer is remembered until the machine is restarted.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.vm.cache import cache_dir, locked
from tests.vm.steps import say, step

KVM = Path("/dev/kvm")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PROBE_SECONDS = 12.0
# Without AVX2: the emulation of its masked loads (vpmaskmov, seen with QEMU 7.2) faults on elements
# that are masked out, and numpy's sort then dies at random.
_EMULATED_CPU = "max,avx2=off"


def choose() -> str:
    """ "kvm" or "tcg"; $MERGEMEM_ACCELERATOR overrides the probe."""
    forced = os.environ.get("MERGEMEM_ACCELERATOR")
    if forced in ("kvm", "tcg"):
        return forced
    if not os.access(KVM, os.R_OK | os.W_OK):
        return "tcg"
    answer = cache_dir() / "accelerator" / BOOT_ID.read_text(encoding="utf-8").strip()
    with locked(answer):
        if not answer.exists():
            with step("probe KVM by booting a guest"):
                answer.write_text("kvm" if _kvm_works() else "tcg", encoding="utf-8")
            say(f"guests will run with {answer.read_text(encoding='utf-8')}")
    return answer.read_text(encoding="utf-8")


def arguments(name: str) -> list[str]:
    if name == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    if name == "icount":
        # One nanosecond an instruction: figures that repeat, however busy the host is.
        # Without fast strings, of which each byte would count as one.
        cpu = f"{_EMULATED_CPU},erms=off,fsrm=off"
        return ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-cpu", cpu]
    return ["-accel", "tcg,thread=multi", "-cpu", _EMULATED_CPU]


def _kvm_works() -> bool:
    # Here, since a guest asks us how to accelerate.
    from tests.vm.guest import Guest, GuestError

    try:
        probe = Guest(kernel="newest", accelerator="kvm", module=False)
        return probe.run("true", time_limit_seconds=PROBE_SECONDS).status == 0
    except GuestError:
        return False
