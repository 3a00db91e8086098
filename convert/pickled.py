"""What a pickle of PyTorch's may describe: storages, tensors, dictionaries, and things kept beside them.

Nothing is looked up or run: a name stands for itself, and what it makes is a plain value.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

from ..errors import shown
from ..weights.tensorfile import MAX_DIMENSIONS

MAX_NAME = 1_000
"""Characters of a name: one of megabytes would be put together anew by every two bytes."""
MAX_EXPANDED = 1 << 26
"""Values of a tensor that repeats its storage's; others have no more values than their storage."""

STORAGES = {
    "torch.FloatStorage": "F32", "torch.DoubleStorage": "F64", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GlobalName:
    """A name that the program mentions (never what the name stands for); one object per name."""

    full: str

    def __str__(self) -> str:
        return self.full


@dataclass(frozen=True, slots=True)
class StorageInfo:
    """A run of elements in the file that tensors are views of."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as the program describes it: a strided view of a storage, perhaps negated."""

    storage: StorageInfo
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    negated: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Placeholder:
    """Something beside the weights that is not needed: only what it was is kept."""

    kind: str

    def __str__(self) -> str:
        return self.kind

    @property
    def is_array(self) -> bool:
        """Whether it may have held weights, in a form that is not read."""
        return self.kind.endswith(ARRAYS)


class Refused(Exception):  # noqa: N818 - becomes a CheckpointError that names the file
    """Why a file is refused: one clause."""


def storage_info(identity: object) -> StorageInfo:
    """Check a storage's persistent id: ('storage', type, key, device, elements[, view])."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise Refused(f"it refers to {shown(kind_of(identity))} outside of itself")
    kind, key, numel = identity[1], identity[2], identity[4]
    dtype = STORAGES.get(str(kind)) if isinstance(kind, GlobalName) else None
    if dtype is None:
        raise Refused(
            f"it holds a storage of the kind {shown(kind_of(kind))}, which is not supported"
        )
    if not is_storage_key(key) or not is_size(numel) or identity[5:] not in ((), (None,)):
        raise Refused("a storage is described in a way that torch.save does not use")
    return StorageInfo(str(key), dtype, numel)


def _tensor(arguments: tuple[object, ...]) -> TensorInfo:
    """Describe `torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, ..., metadata)`."""
    if len(arguments) < 4:
        raise Refused("a tensor is described incompletely")
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, StorageInfo) or not is_size(offset):
        raise Refused("a tensor is described without a storage")
    if not _are_sizes(shape) or not _are_sizes(strides) or len(shape) != len(strides):
        raise Refused(f"a tensor has the shape {shown(kind_of(shape))}, which is not one")
    if len(shape) > MAX_DIMENSIONS:
        raise Refused(f"a tensor has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
    numel, last = 1, offset
    for size, step in zip(shape, strides, strict=True):
        numel *= size
        last += (size - 1) * step
    if numel and last >= storage.numel:
        raise Refused(f"a tensor of the shape {shown(list(shape))} leaves its storage")
    if numel > max(storage.numel, MAX_EXPANDED):
        raise Refused(
            f"a tensor of the shape {shown(list(shape))} repeats {storage.numel} values; save it "
            "as tensor.contiguous()"
        )
    metadata = arguments[6] if len(arguments) > 6 else None
    negated = metadata == {"neg": True} and storage.dtype != "BOOL"
    if metadata not in (None, {}) and not negated:
        names = ", ".join(map(str, metadata)) if isinstance(metadata, dict) else kind_of(metadata)
        raise Refused(f"a tensor has the metadata {shown(names)}, which would change its values")
    return TensorInfo(storage, offset, shape, strides, negated)


def _typed_tensor(arguments: tuple[object, ...]) -> TensorInfo:
    """Describe `torch._tensor._rebuild_from_type_v2(rebuild, type, arguments, state)`."""
    name, kind, inner = (*arguments, None, None, None)[:3]
    plain = ("torch.Tensor", "torch.nn.parameter.Parameter")
    make = _TENSORS.get(kind_of(name))
    if make is None or kind_of(kind) not in plain or not isinstance(inner, tuple):
        raise Refused(
            f"it holds a tensor of the kind {shown(kind_of(kind))}, which is not supported"
        )
    return make(inner)


def _parameter(arguments: tuple[object, ...]) -> TensorInfo:
    data = arguments[0] if arguments else None
    if not isinstance(data, TensorInfo):
        raise Refused("a parameter is described without a tensor")
    return data


def _dictionary(arguments: tuple[object, ...]) -> dict[object, object]:
    """Make what `OrderedDict(pairs)` or `Counter(dictionary)` holds."""
    pairs = arguments[0] if arguments else []
    if isinstance(pairs, dict):
        return dict(pairs)
    if not isinstance(pairs, list) or not all(
        isinstance(p, list | tuple) and len(p) == 2 for p in pairs
    ):
        raise Refused("an OrderedDict is described in a way that torch.save does not use")
    return {dictionary_key(key): value for key, value in pairs}


def _sequence(arguments: tuple[object, ...]) -> tuple[object, ...]:
    items = arguments[0] if arguments else ()
    if not isinstance(items, list | tuple):
        raise Refused("a torch.Size is described in a way that torch.save does not use")
    return tuple(items)


_TENSORS: dict[str, Callable[[tuple[object, ...]], TensorInfo]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed_tensor,
}
APPLIED: dict[str, Callable[[tuple[object, ...]], object]] = {
    **_TENSORS,
    "collections.OrderedDict": _dictionary,
    "collections.Counter": _dictionary,
    "collections.defaultdict": lambda _: {},
    "torch.Size": _sequence,
}
"""Every name that means something, and what is made of it. Nothing here runs code of the file."""

FOREIGN_TENSORS = {
    "torch._utils._rebuild_tensor_v3": "a tensor of 8-bit floats or another type that is not read; save "
    "it in 16 or 32 bits",
    "torch._utils._rebuild_qtensor": "a quantised tensor; save tensor.dequantize()",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor; save tensor.to_dense()",
    "torch._utils._rebuild_nested_tensor": "a nested tensor; save its parts one by one",
    "torch.nested._internal.nested_tensor._rebuild_njt": "a nested tensor; save its parts one by one",
    "torch.ComplexFloatStorage": "complex numbers; save torch.view_as_real(tensor)",
    "torch.ComplexDoubleStorage": "complex numbers; save torch.view_as_real(tensor)",
    "torch.storage.UntypedStorage": "a storage without a type; save tensors of it",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values; save the model loaded",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a class of its own; save a plain one",
    "torch.distributed.tensor.DTensor": "a tensor divided over machines; save tensor.full_tensor()",
}
"""Tensors that are not read, and what to save instead."""

BESIDE = re.compile(
    r"numpy(\.\w+)*\.(scalar|dtype|ndarray|_reconstruct|_frombuffer|\w+DType|u?int\d+|float\d+|bool_?)"
    r"|torch\.(device|dtype|Tensor|nn\.parameter\.Parameter|layout|strided|Generator|serialization\._get_layout)"
    r"|torch\.(b?float|u?int|complex|double|half|long|short|bool)\d*"
    r"|builtins\.(set|frozenset|list|dict|tuple|int|float|bool|str|bytes|bytearray|complex|slice|range|object|Ellipsis|NotImplemented)"
    r"|__builtin__\.(set|frozenset|list|dict|tuple|int|float|bool|str|long|bytearray|complex|slice|xrange|object|Ellipsis|NotImplemented)"
    r"|_codecs\.encode|copyreg\._reconstructor|copy_reg\._reconstructor|collections\.deque"
    r"|(argparse|types)\.\w*Namespace|pathlib\.\w*Path|pathlib\._local\.\w*Path"
    r"|datetime\.\w+|enum\.\w+|typing\.\w+|decimal\.Decimal|fractions\.Fraction|uuid\.UUID"
    r"|torch\.torch_version\.TorchVersion"
    r"|(omegaconf|lightning|pytorch_lightning|lightning_fabric|transformers|accelerate)(\.\w+)+"
    r"|(__main__|__mp_main__)\.\w+"
)
"""Names of what trainers keep beside the weights: numbers, sets, devices, paths, settings."""
ARRAYS = ("_reconstruct", "_frombuffer", "ndarray", "Tensor", "Parameter")


def dictionary_key(key: object) -> object:
    """Return a dictionary key if it is text, else a placeholder.

    Nested tuples could hash for ever, and unlike texts' the hashes of numbers are known: 100,000 of
    one hash are compared with each other for minutes.
    """
    return key if isinstance(key, str) else Placeholder(kind_of(key))


def is_storage_key(key: object) -> TypeGuard[str | int]:
    """Say whether a value can be the key of a storage: made text again and again, it must be short."""
    return is_size(key) or (isinstance(key, str) and len(key) <= MAX_NAME)


def is_size(value: object) -> TypeGuard[int]:
    """Say whether a value can be a number of elements."""
    return type(value) is int and 0 <= value < 1 << 62


def _are_sizes(value: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and all(map(is_size, value))


def kind_of(value: object) -> str:
    """Return what kind of value this is, in words for an error message."""
    named = isinstance(value, GlobalName | Placeholder)
    return str(value) if named else type(value).__name__.strip("_")
