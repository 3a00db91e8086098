"""Have a loaded library call another's functions: write their addresses where its linker keeps them.

A shared library calls a function of another through a slot of its own, which the loader fills with
an address. Writing another address there redirects this one library and no other, needs no
compiler and no file, and works before and after the library has been used. ELF on 64-bit Linux;
https://refspecs.linuxfoundation.org/elf/gabi4+/ch5.dynamic.html has the tables.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

# What a slot's entry is called: a jump slot, and a plain address.
_SLOT_TYPES = {"x86_64": (7, 6), "aarch64": (1026, 1025)}
_STRTAB, _SYMTAB, _RELA, _RELASZ, _JMPREL, _PLTRELSZ = 5, 6, 7, 8, 23, 2
_ADDRESSES = (_STRTAB, _SYMTAB, _RELA, _JMPREL)
_SYMBOL_BYTES, _RELA_ENTRY = 24, struct.Struct("<QQq")
_LINK_MAP_REQUEST = 2


class _LinkMap(ctypes.Structure):
    """How the loader describes a library: where it lies, its name, its table of tables."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("dynamic", ctypes.c_uint64),
    )


class _Symbol(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_uint32),
        ("info", ctypes.c_uint8),
        ("other", ctypes.c_uint8),
        ("section", ctypes.c_uint16),
        ("value", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    )


def supported() -> bool:
    """Tell whether libraries of this process can be relinked."""
    return (
        platform.system() == "Linux"
        and platform.machine() in _SLOT_TYPES
        and struct.calcsize("P") == 8
    )


def relink(library: ctypes.CDLL, targets: Mapping[str, int]) -> list[str]:
    """Redirect a library's calls of the named functions to these addresses; return those it calls.

    Raises:
        OSError: the loader does not describe the library, or its slots cannot be written to.
    """
    slots = dict(_slots(library, {name.encode() for name in targets}))
    for name, slot in slots.items():
        _write(slot, targets[name.decode()])
    return sorted(name.decode() for name in slots)


def _slots(library: ctypes.CDLL, names: set[bytes]) -> Iterator[tuple[bytes, int]]:
    """Yield the functions of other libraries that this one calls, each with its slot's address."""
    link_map = _link_map(library)
    tables = _tables(link_map)
    types = _SLOT_TYPES[platform.machine()]
    for start, length in ((_JMPREL, _PLTRELSZ), (_RELA, _RELASZ)):
        if not (tables.get(start) and tables.get(length)):
            continue
        entries = ctypes.string_at(tables[start], tables[length])
        for offset, info, _ in _RELA_ENTRY.iter_unpack(entries):
            if info & 0xFFFFFFFF not in types:
                continue
            symbol = _Symbol.from_address(tables[_SYMTAB] + (info >> 32) * _SYMBOL_BYTES)
            name = ctypes.string_at(tables[_STRTAB] + symbol.name)
            if name in names:
                yield name, link_map.base + offset


def _link_map(library: ctypes.CDLL) -> _LinkMap:
    found = ctypes.POINTER(_LinkMap)()
    dlinfo = ctypes.CDLL(None).dlinfo
    dlinfo.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    if dlinfo(library._handle, _LINK_MAP_REQUEST, ctypes.byref(found)) or not found:
        raise OSError(f"the loader does not say where {library._name} lies")
    return found.contents


def _tables(link_map: _LinkMap) -> dict[int, int]:
    """Return the library's table of tables: by kind, an address or a size."""
    tables: dict[int, int] = {}
    address = link_map.dynamic
    while True:
        kind, value = struct.unpack("<QQ", ctypes.string_at(address, 16))
        if kind == 0:
            return tables
        if kind in _ADDRESSES and value < link_map.base:
            value += link_map.base  # a loader that leaves addresses as the file has them
        tables[kind] = value
        address += 16


def _write(slot: int, address: int) -> None:
    """Write an address; a page that the loader has closed for writing is opened for that moment."""
    page = slot & ~(mmap.PAGESIZE - 1)
    closed = not _writable(slot)
    if closed:
        _protect(page, mmap.PROT_READ | mmap.PROT_WRITE)
    ctypes.c_uint64.from_address(slot).value = address
    if closed:
        _protect(page, mmap.PROT_READ)


def _protect(page: int, access: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.mprotect(page, mmap.PAGESIZE, access):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _writable(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, access, *_ = line.split()
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            return "w" in access
    raise OSError(f"address {address:x} is not of this process")
