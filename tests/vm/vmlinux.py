# SPDX-License-Identifier: MIT
"""The uncompressed kernel inside a bzImage.

QEMU enters an ELF file that carries the PVH note directly, which saves decompressing 60 MiB
under emulation.
"""

from __future__ import annotations

import lzma
import struct
import subprocess
from pathlib import Path

XZ_MAGIC = b"\xfd7zXZ\x00"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ELF_MAGIC = b"\x7fELF"
# xen/interface/elfnote.h: XEN_ELFNOTE_PHYS32_ENTRY, the address where PVH loaders jump to.
PVH_NOTE = struct.pack("<III", 4, 8, 18) + b"Xen\x00"
PVH_NOTE_32 = struct.pack("<III", 4, 4, 18) + b"Xen\x00"


class ImageError(Exception):
    """The file is not a kernel that can be unpacked."""


def payload(image: bytes) -> bytes:
    """The compressed kernel, located by the setup header (Documentation/arch/x86/boot.rst)."""
    if len(image) < 0x250 or image[0x202:0x206] != b"HdrS":
        raise ImageError("no setup header: not a bzImage")
    (version,) = struct.unpack_from("<H", image, 0x206)
    if version < 0x208:
        raise ImageError(f"boot protocol {version:#x} is too old to tell where the payload is")
    # Zero means four, for historical reasons; the boot sector comes on top.
    start = ((image[0x1F1] or 4) + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    return image[start + offset : start + offset + length]


def decompress(data: bytes) -> bytes:
    """The ELF file in a payload, whose last four bytes are its size."""
    (size,) = struct.unpack("<I", data[-4:])
    if data.startswith(XZ_MAGIC):
        elf = lzma.LZMADecompressor().decompress(data)
    elif data.startswith(ZSTD_MAGIC):
        # Python 3.11 has no zstd.
        elf = subprocess.run(["zstd", "-dcq"], input=data[:-4], capture_output=True).stdout
    else:
        raise ImageError(f"unknown compression, first bytes {data[:6].hex()}")
    if len(elf) != size or not elf.startswith(ELF_MAGIC):
        raise ImageError(f"unpacked to {len(elf)} bytes, expected an ELF file of {size}")
    return elf


def has_pvh_entry(elf: bytes) -> bool:
    return PVH_NOTE in elf or PVH_NOTE_32 in elf


def extract(bzimage: Path, vmlinux: Path) -> None:
    elf = decompress(payload(bzimage.read_bytes()))
    if not has_pvh_entry(elf):
        raise ImageError("the kernel has no PVH entry; give it boot = 'bzimage'")
    vmlinux.write_bytes(elf)
