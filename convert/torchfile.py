"""PyTorch's own files (`torch.save`), read without torch.

    zip format (torch >= 1.6)               legacy format
      name/data.pkl    the program            magic, version, system: three pickles
      name/data/0 ...  storages, stored       the program · list of storage keys
      name/byteorder   little                 per key: 8 bytes of length, then its bytes

The program is interpreted by `pickles.py`, which runs nothing. Storages are not read here: a tensor
keeps where its bytes are (`tensors.py`). Compressed members (zip bombs), members that overlap or
leave the file, and tensors that leave their storage are refused.
"""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import CheckpointError, shown
from ..weights.tensorfile import NUMPY_TYPES, open_file, read_exactly
from .pickled import (
    Refused,
    StorageInfo,
    TensorInfo,
    is_storage_key,
    storage_info,
)
from .pickles import MAX_PROGRAM_BYTES, unpickle
from .state_dicts import state_dict
from .tensors import Tensor

MAX_ZIP_MEMBERS = 200_000
MAX_DIRECTORY_BYTES = 32 << 20
_HEADER_PROGRAM_BYTES = 1 << 16
_DIRECTORY_BYTES = 5  # its place in zipfile's own record of a zip file's end
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_TAR_MAGIC_AT = 257
_LOCAL_HEADER = struct.Struct("<4s22xHH")


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.bin`, `.pt` or `.pth` file, zip or legacy format, by name.

    The file holds a state dict, or a dict with one under `state_dict`, `model_state_dict`,
    `model` or `module`, as trainers write it.

    Raises:
        CheckpointError: not such a file, damaged, or it mentions something other than tensors.
    """
    try:
        with open_file(path, CheckpointError) as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            value, places = _read_zip(file) if is_zip else _read_legacy(file)
            tensors = state_dict(value)
            return {name: _locate(name, each, places, path) for name, each in tensors.items()}
    except Refused as reason:
        raise CheckpointError(f"{path} is refused: {reason}.") from None
    except MemoryError:
        raise CheckpointError(
            f"there is not enough memory to read the table of tensors of {path}; close other programs."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from None


def _locate(name: str, tensor: TensorInfo, places: dict[str, int], path: Path) -> Tensor:
    storage = places[tensor.storage.key]
    dtype = tensor.storage.dtype
    own = storage + tensor.offset * NUMPY_TYPES[dtype].itemsize
    start = own if _in_order(tensor) and not tensor.negated else None
    operations = ("negate",) if tensor.negated else ()
    read = lambda: _read_view(path, tensor, storage)  # noqa: E731
    return Tensor.in_file(name, dtype, tensor.shape, path, read, start, operations)


def _in_order(tensor: TensorInfo) -> bool:
    """Whether the elements lie one after another."""
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _read_view(path: Path, tensor: TensorInfo, start: int) -> np.ndarray:
    """Read the span of the storage that a tensor covers, and put its elements in order."""
    dtype = NUMPY_TYPES[tensor.storage.dtype]
    steps = list(zip(tensor.shape, tensor.strides, strict=True))
    span = 1 + sum((size - 1) * step for size, step in steps) if 0 not in tensor.shape else 0
    flat = np.empty(span, dtype)
    with path.open("rb", buffering=0) as file:
        read_exactly(file, start + tensor.offset * dtype.itemsize, flat)
    if not span:
        return flat.reshape(tensor.shape)
    strides = [step * dtype.itemsize for step in tensor.strides]
    view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
    bits = view.copy(order="C")
    if not tensor.negated:
        return bits
    is_bfloat16 = tensor.storage.dtype == "BF16"
    return bits ^ np.uint16(0x8000) if is_bfloat16 else np.negative(bits)


def _read_zip(file: BinaryIO) -> tuple[object, dict[str, int]]:
    """Return the program's result and where each storage's bytes start in the file."""
    try:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # before its directory is read
        if end is not None and end[_DIRECTORY_BYTES] > MAX_DIRECTORY_BYTES:
            raise Refused("its zip directory is larger than any state dict's")
        members = zipfile.ZipFile(file).infolist()
    except (MemoryError, Refused):
        raise
    except Exception:
        raise Refused("its zip directory is damaged; get the file again") from None
    programs = [info for info in members if info.filename.endswith("/data.pkl")]
    if len(programs) != 1 or len(members) > MAX_ZIP_MEMBERS:
        raise Refused("it is a zip file but not one that torch.save wrote (one data.pkl)")
    prefix = programs[0].filename[: -len("data.pkl")]
    if any(info.filename.startswith(prefix + "code/") for info in members):
        raise Refused("it is a TorchScript archive, which is a program; save the state dict")
    ranges = _member_ranges(file, members)
    start, size = ranges[programs[0].filename]
    order = ranges.get(prefix + "byteorder")
    if order and _slice(file, order[0], min(order[1], 16)) != b"little":
        raise Refused("it was written on a big-endian machine, which is not supported")
    if size > MAX_PROGRAM_BYTES:
        raise Refused(f"its data.pkl is {size} bytes long, more than any state dict needs")
    places: dict[str, int] = {}

    def find(identity: object) -> StorageInfo:
        storage = storage_info(identity)
        begin, available = ranges.get(f"{prefix}data/{storage.key}", (0, -1))
        if storage.numel * NUMPY_TYPES[storage.dtype].itemsize > available:
            raise Refused(f"the storage {shown(storage.key)} is missing or too short")
        places[storage.key] = begin
        return storage

    return unpickle(io.BytesIO(_slice(file, start, size)), find), places


def _member_ranges(file: BinaryIO, members: list[zipfile.ZipInfo]) -> dict[str, tuple[int, int]]:
    """Return name -> (start, size) of members, all stored plainly, inside the file and apart."""
    end = file.seek(0, io.SEEK_END)
    ranges: dict[str, tuple[int, int]] = {}
    position = 0
    for info in sorted(members, key=lambda info: info.header_offset):
        name = info.orig_filename
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
            raise Refused(f"its member {shown(name)} is compressed or encrypted")
        if info.compress_size != info.file_size or name in ranges or name != info.filename:
            raise Refused(f"its member {shown(name)} is inconsistent")
        header = _slice(file, info.header_offset, _LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            raise Refused(f"its member {shown(name)} is not where the zip directory says")
        _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if info.header_offset < position or start + info.file_size > end:
            raise Refused(f"its member {shown(name)} overlaps another or leaves the file")
        position = start + info.file_size
        ranges[name] = (start, info.file_size)
    return ranges


def _slice(file: BinaryIO, start: int, size: int) -> bytes:
    if not 0 <= start < 1 << 62:
        return b""
    file.seek(start)
    return file.read(size)


def _read_legacy(file: BinaryIO) -> tuple[object, dict[str, int]]:
    """Return the program's result and where each storage's bytes start in the file."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if _slice(file, _TAR_MAGIC_AT, 5) == b"ustar":
        raise Refused(
            "it is a tar file, as torch wrote before 2017; load it there and save it again"
        )
    file.seek(0)
    if unpickle(file, _no_storage, _HEADER_PROGRAM_BYTES) != _LEGACY_MAGIC:
        raise Refused("it is not a file that torch.save wrote")
    if unpickle(file, _no_storage, _HEADER_PROGRAM_BYTES) != _LEGACY_VERSION:
        raise Refused(f"its format is not the legacy version {_LEGACY_VERSION}; save it again")
    system = unpickle(file, _no_storage, _HEADER_PROGRAM_BYTES)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("it was written on a big-endian machine, which is not supported")
    storages: dict[str, StorageInfo] = {}

    def find(identity: object) -> StorageInfo:
        storage = storage_info(identity)
        if storages.setdefault(storage.key, storage) != storage:
            raise Refused(f"the storage {shown(storage.key)} is described in two ways")
        return storage

    value = unpickle(file, find)
    keys = unpickle(file, _no_storage)
    keys = keys if isinstance(keys, list) else []
    is_plain = len(keys) == len(storages) and all(map(is_storage_key, keys))
    if not is_plain or sorted(map(str, keys)) != sorted(storages):
        raise Refused("its list of storages does not match its tensors")
    places = {}
    for key in keys:
        storage = storages[str(key)]
        head = file.read(8)
        numel = struct.unpack("<q", head)[0] if len(head) == 8 else -1
        places[storage.key] = file.tell()
        nbytes = numel * NUMPY_TYPES[storage.dtype].itemsize
        if numel < storage.numel or nbytes > size - places[storage.key]:
            raise Refused(f"the storage {shown(storage.key)} is cut short; get the file again")
        file.seek(nbytes, io.SEEK_CUR)
    return value, places


def _no_storage(_: object) -> StorageInfo:
    raise Refused("a storage appears where none may be")
