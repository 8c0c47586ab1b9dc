# SPDX-License-Identifier: MIT
"""The guest's first file system: busybox, the drivers that reach the host's files, and `init`."""

from __future__ import annotations

import lzma
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.vm.cache import cache_dir, content_key, make_once
from tests.vm.steps import StepFailed
from tests.vm.tree import Tree

BUSYBOX = Path("/bin/busybox")
INIT = Path(__file__).with_name("init")
# 9p and overlay make the root; the rest (swap, say) is loaded from there.
DRIVERS = ("virtio_pci", "9pnet_virtio", "9p", "overlay")


def make(tree: Tree) -> Path:
    """The initramfs for a kernel, from the cache while nothing in it has changed."""
    key = content_key([BUSYBOX, INIT, Path(__file__), str(tree.modules)])
    directory = make_once(cache_dir() / "initramfs" / key, lambda into: _make(tree, into))
    return directory / "initramfs.cpio"


def insertion_order(dependencies: Mapping[str, Sequence[str]], names: Sequence[str]) -> list[str]:
    """The files to insert, in order, for drivers that may each be a module or built in."""
    by_name = {_module_name(path): path for path in dependencies}
    order: list[str] = []
    for name in names:
        path = by_name.get(name)
        # modules.dep lists the nearest dependency first.
        for needed in [*reversed(dependencies[path]), path] if path else []:
            if needed not in order:
                order.append(needed)
    return order


def parse_dependencies(text: str) -> dict[str, list[str]]:
    """modules.dep: "kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko …"."""
    lines = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {path: needs.split() for path, needs in lines}


def _module_name(path: str) -> str:
    return Path(path).name.split(".ko")[0].replace("-", "_")


def _make(tree: Tree, into: Path) -> None:
    root = into / "root"
    for directory in ("bin", "drivers", "proc", "sys", "dev"):
        (root / directory).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    shutil.copy(INIT, root / "init")
    (root / "init").chmod(0o755)
    dependencies = parse_dependencies((tree.modules / "modules.dep").read_text(encoding="utf-8"))
    for number, path in enumerate(insertion_order(dependencies, DRIVERS)):
        data = (tree.modules / path).read_bytes()
        # The kernel's own decompressor and busybox's differ by version; plain files always load.
        data = lzma.decompress(data) if path.endswith(".xz") else data
        (root / "drivers" / f"{number:02}-{_module_name(path)}.ko").write_bytes(data)
    _archive(root, into / "initramfs.cpio")
    shutil.rmtree(root)


def _archive(root: Path, archive: Path) -> None:
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    with open(archive, "wb") as output:
        command = ["cpio", "--quiet", "-o", "-H", "newc", "--owner", "0:0"]
        done = subprocess.run(command, cwd=root, input=names.encode(), stdout=output)
    if done.returncode:
        raise StepFailed("cpio failed")
