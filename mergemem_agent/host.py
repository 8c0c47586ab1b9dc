# SPDX-License-Identifier: MIT
"""Facts about a host, read from the files below its root directory; `doctor` judges them."""

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_SIGNATURE = b"~Module signature appended~\n"
# The variable of the UEFI specification, with the GUID of EFI_GLOBAL_VARIABLE.
_SECURE_BOOT = "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"

CAPABILITIES = {
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_SYS_MODULE": 16,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}


@dataclass(frozen=True)
class Host:
    """The host whose root directory is `root`: "/", or a tree that a test has made.

    What cannot be read is empty, zero or None: every method says which.
    """

    root: Path = Path("/")

    def text(self, path: str) -> str:
        """Return a file's text without blanks around it, empty if there is none to be had."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def exists(self, path: str) -> bool:
        """Tell whether a file is there; absolute links on the way count from `root`."""
        return self._resolve(self.root / path).exists()

    def _resolve(self, path: Path) -> Path:
        # One link at the end of the path is what /lib/modules/VERSION/build is, to an absolute
        # path, which in another root leads elsewhere.
        if path.is_symlink():
            return self.root / os.path.join(path.parent, os.readlink(path)).lstrip("/")
        return path

    @cached_property
    def kernel(self) -> str:
        """The kernel's release, as uname -r has it."""
        return self.text("proc/sys/kernel/osrelease")

    @property
    def kernel_series(self) -> str:
        """Its first two numbers, as in "6.1"; empty if it has none."""
        match = re.match(r"\d+\.\d+", self.kernel)
        return match.group() if match else ""

    def option(self, name: str) -> bool | None:
        """Tell whether the kernel was configured with an option; None where that cannot be told."""
        config = self.text(f"boot/config-{self.kernel}")
        if not config:
            return None
        return re.search(rf"^{name}=[ym]$", config, re.MULTILINE) is not None

    @property
    def module_file(self) -> Path | None:
        """The installed mergemem.ko, compressed or not."""
        modules = self.root / "lib/modules" / self.kernel
        for folder in ("updates", "extra", "weak-updates", "misc"):
            for path in sorted((modules / folder).rglob("mergemem.ko*")):
                return path
        return None

    def module_signed(self, module: Path) -> bool | None:
        """Tell whether a module carries a signature, of whomever; None if it is compressed."""
        if module.suffix != ".ko":
            return None
        try:
            return module.read_bytes().endswith(_SIGNATURE)
        except OSError:
            return None

    @property
    def dkms_versions(self) -> list[str]:
        """The versions of the module that DKMS knows, built for this kernel or not."""
        versions = (self.root / "var/lib/dkms/mergemem").glob("*/source")
        return sorted(path.parent.name for path in versions)

    @property
    def secure_boot(self) -> bool | None:
        """Whether UEFI Secure Boot is on; None where there is no UEFI."""
        try:
            # Four bytes of attributes, then the value.
            value = (self.root / "sys/firmware/efi/efivars" / _SECURE_BOOT).read_bytes()
        except OSError:
            return None
        return value[4:5] == b"\1"

    @property
    def lockdown(self) -> str:
        """The mode of kernel lockdown: none, integrity or confidentiality."""
        return chosen(self.text("sys/kernel/security/lockdown")) or "none"

    @property
    def signatures_enforced(self) -> bool:
        """Whether the kernel refuses modules without a signature that it trusts."""
        return (
            self.text("sys/module/module/parameters/sig_enforce") == "Y" or self.lockdown != "none"
        )

    @property
    def capabilities(self) -> frozenset[str]:
        """Those of CAPABILITIES that the caller has in effect."""
        match = re.search(r"^CapEff:\s*([0-9a-f]+)$", self.text("proc/self/status"), re.MULTILINE)
        effective = int(match.group(1), 16) if match else 0
        return frozenset(name for name, bit in CAPABILITIES.items() if effective >> bit & 1)

    @property
    def initial_user_namespace(self) -> bool:
        """Whether the caller's user ids are those of the host."""
        return self.text("proc/self/uid_map").split() == ["0", "0", "4294967295"]

    def memory_bytes(self, key: str) -> int:
        """Return a line of /proc/meminfo, such as MemTotal; 0 if it has none."""
        match = re.search(rf"^{key}:\s*(\d+) kB$", self.text("proc/meminfo"), re.MULTILINE)
        return int(match.group(1)) * 1024 if match else 0


def chosen(text: str) -> str:
    """Return what stands in brackets, as the kernel marks the choice of several."""
    match = re.search(r"\[(\S+)\]", text)
    return match.group(1) if match else ""
