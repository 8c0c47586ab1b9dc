# SPDX-License-Identifier: MIT
"""From packages to a bootable guest: the parts that need no machine."""

from __future__ import annotations

import lzma
import struct
import subprocess
from pathlib import Path

import pytest

from tests.vm import cache, debian, initramfs, tree, vmlinux

ELF = vmlinux.ELF_MAGIC + b"\0" * 60 + vmlinux.PVH_NOTE + b"kernel" * 1000


def bzimage(payload: bytes, *, version: int = 0x20F, setup_sectors: int = 2) -> bytes:
    """A bzImage as the boot protocol describes it, with junk around the payload."""
    start = (setup_sectors + 1) * 512
    image = bytearray(b"\xaa" * (start + 100)) + payload + b"\xbb" * 50
    image[0x1F1] = setup_sectors
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, version)
    struct.pack_into("<II", image, 0x248, 100, len(payload))
    return bytes(image)


def packed(elf: bytes) -> bytes:
    return lzma.compress(elf) + struct.pack("<I", len(elf))


def test_vmlinux_comes_out_as_it_went_in(tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(bzimage(packed(ELF)))
    vmlinux.extract(tmp_path / "vmlinuz", tmp_path / "vmlinux")
    assert (tmp_path / "vmlinux").read_bytes() == ELF


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (b"MZ", "not a bzImage"),
        (bzimage(packed(ELF), version=0x207), "too old"),
        (bzimage(b"\x1f\x8b\x08\x00" + packed(ELF)), "unknown compression, first bytes 1f8b"),
        (bzimage(lzma.compress(ELF) + struct.pack("<I", 5)), "expected an ELF file of 5"),
        (bzimage(packed(b"#!/bin/sh")), "expected an ELF file"),
        (bzimage(packed(vmlinux.ELF_MAGIC + b"\0" * 100)), "no PVH entry"),
    ],
)
def test_what_is_no_such_kernel_is_refused(tmp_path: Path, image: bytes, complaint: str) -> None:
    (tmp_path / "vmlinuz").write_bytes(image)
    with pytest.raises(vmlinux.ImageError, match=complaint):
        vmlinux.extract(tmp_path / "vmlinuz", tmp_path / "vmlinux")
    assert not (tmp_path / "vmlinux").exists()


MODULES_DEP = """\
kernel/fs/9p/9p.ko.xz: kernel/fs/netfs/netfs.ko.xz kernel/net/9p/9pnet.ko.xz
kernel/net/9p/9pnet.ko.xz:
kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko.xz
kernel/fs/netfs/netfs.ko.xz:
kernel/drivers/virtio/virtio-ring.ko: kernel/drivers/virtio/virtio.ko
"""


def order(*names: str) -> list[str]:
    dependencies = initramfs.parse_dependencies(MODULES_DEP)
    return [Path(p).name for p in initramfs.insertion_order(dependencies, names)]


def test_drivers_come_after_what_they_need_and_once() -> None:
    assert order("9pnet_virtio", "9p") == [
        "9pnet.ko.xz",
        "9pnet_virtio.ko.xz",
        "netfs.ko.xz",
        "9p.ko.xz",
    ]


def test_built_in_drivers_are_left_out() -> None:
    assert order("virtio_pci", "virtio_ring") == ["virtio.ko", "virtio-ring.ko"]


def test_dependencies_take_the_first_alternative() -> None:
    depends = "linux-base (>= 4.12~), linux-image-6.12-amd64 (= 6.12-1) | linux-image-x, gcc-12"
    assert debian.first_choices(depends) == ["linux-base", "linux-image-6.12-amd64", "gcc-12"]
    assert debian.first_choices("") == []


def test_the_parts_of_a_kernel() -> None:
    parts = "linux-image-6.1.0-1-amd64 linux-binary-7 linux-headers-6.1-common linux-kbuild-6.1"
    parts += " linux-base-7.3.4-amd64 linux-modules-7.3.4-amd64"
    assert all(tree.PARTS.match(name) for name in parts.split())
    others = "linux-base linux-compiler-gcc-12-x86 linux-initramfs-tool initramfs-tools gcc-12"
    assert not any(tree.PARTS.match(name) for name in others.split())


def test_the_first_stanza_counts() -> None:
    text = "Package: a\nVersion: 2\nDepends: b (= 2), c\n continued: no\n\nPackage: a\nVersion: 1\n"
    assert debian.parse_stanza(text) == debian.Package("a", "2", "b (= 2), c")


def test_headers_are_usable_where_they_lie(tmp_path: Path) -> None:
    modules = tmp_path / "usr/lib/modules/6.1.0-1-amd64"
    headers = tmp_path / "usr/src/linux-headers-6.1.0-1-amd64"
    common = tmp_path / "usr/src/linux-headers-6.1.0-1-common"
    for directory in (modules, headers, common):
        directory.mkdir(parents=True)
    (modules / "build").symlink_to("/usr/src/linux-headers-6.1.0-1-amd64")
    (headers / "Makefile").write_text("include /usr/src/linux-headers-6.1.0-1-common/Makefile\n")
    tree.relocate(tmp_path)
    assert (modules / "build").resolve() == headers
    assert "/usr/src/" not in (headers / "Makefile").read_text()


def test_headers_that_name_their_output_are_usable_where_they_lie(tmp_path: Path) -> None:
    headers = tmp_path / "usr/src/linux-headers-7.3.4-amd64"
    common = tmp_path / "usr/src/linux-headers-7.3.4-common"
    for directory in (headers, common):
        directory.mkdir(parents=True)
    (headers / "Makefile").write_text(
        "KBUILD_OUTPUT=/usr/src/linux-headers-7.3.4-amd64\n"
        "include /usr/src/linux-headers-7.3.4-common/Makefile\n"
    )
    (common / "Makefile").write_text("all:\n\t@realpath $(KBUILD_OUTPUT)\n")
    tree.relocate(tmp_path)
    done = subprocess.run(["make", "-sC", headers], stdout=subprocess.PIPE, text=True)
    assert done.stdout.strip() == str(headers)


def test_what_is_made_once_is_whole_or_absent(tmp_path: Path) -> None:
    made = []

    def fail(into: Path) -> None:
        (into / "half").touch()
        raise RuntimeError("interrupted")

    def make(into: Path) -> None:
        made.append(into)
        (into / "whole").touch()

    target = tmp_path / "thing"
    with pytest.raises(RuntimeError):
        cache.make_once(target, fail)
    assert not target.exists()
    for _ in range(2):
        assert [path.name for path in cache.make_once(target, make).iterdir()] == ["whole"]
    assert len(made) == 1
    assert not list(tmp_path.glob(".thing.making-*"))


def test_a_key_tells_contents_and_their_borders_apart(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("ab")
    keys = {
        cache.content_key(parts)
        for parts in (["ab", "c"], ["a", "bc"], ["abc"], [tmp_path / "file"], [b"ab", b""])
    }
    assert len(keys) == 5
    assert cache.content_key(["ab"]) == cache.content_key([tmp_path / "file"])
