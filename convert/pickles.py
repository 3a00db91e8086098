"""Pickles, interpreted without running anything in them.

A pickle is a program. `unpickle` interprets the instructions that `torch.save` writes, on plain
Python values; a name it mentions is never looked up. Tensors, storages and dictionaries become
descriptions, what trainers keep beside the weights becomes a `Placeholder`, everything else is
refused with its name.

    GLOBAL torch._utils._rebuild_tensor_v2 · ... · REDUCE   ->   TensorInfo(storage, offset, ...)
    GLOBAL argparse.Namespace · ... · BUILD                 ->   Placeholder("argparse.Namespace")
    GLOBAL posix.system · ...                               ->   refused: it mentions 'posix.system'

A few bytes can ask for much (a list of a million that is copied by every two bytes), so the budget
is on the items a program makes, not only on its length.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeGuard

from ..errors import brief, shown
from ..weights.tensorfile import MAX_DIMENSIONS

MAX_PROGRAM_BYTES = 64 << 20
MAX_ITEMS = 2_000_000
"""Instructions and items of containers: about 40 per tensor, so 50,000 tensors; a few seconds and
some 150 MB where a program is made to waste them."""
MAX_NAME = 1_000
"""Characters of a name: one of megabytes would be put together anew by every two bytes."""
MAX_EXPANDED = 1 << 26
"""Values of a tensor that repeats its storage's; others have no more values than their storage."""

STORAGES = {
    "FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class GlobalName:
    """A name that the program mentions (never what the name stands for)."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class StorageInfo:
    """A run of elements in the file that tensors are views of."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the program describes it: a strided view of a storage, perhaps negated."""

    storage: StorageInfo
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    negated: bool = False


@dataclass(frozen=True, eq=False)
class Placeholder:
    """Something beside the weights that is not needed: only what it was is kept."""

    kind: str

    def __str__(self) -> str:
        return self.kind

    @property
    def is_array(self) -> bool:
        """Whether it may have held weights, in a form that is not read."""
        return self.kind.endswith(_ARRAYS)


class Refused(Exception):  # noqa: N818 - becomes a CheckpointError that names the file
    """Why a file is refused: one clause."""


def storage_info(identity: object) -> StorageInfo:
    """Check a storage's persistent id: ('storage', type, key, device, elements[, view])."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise Refused(f"it refers to {shown(kind_of(identity))} outside of itself")
    kind, key, numel = identity[1], identity[2], identity[4]
    if not isinstance(kind, GlobalName) or kind.module != "torch" or kind.name not in STORAGES:
        raise Refused(
            f"it holds a storage of the kind {shown(kind_of(kind))}, which is not supported"
        )
    plain = isinstance(key, str | int) and len(str(key)) <= MAX_NAME
    if not plain or not is_size(numel) or identity[5:] not in ((), (None,)):
        raise Refused("a storage is described in a way that torch.save does not use")
    return StorageInfo(str(key), STORAGES[kind.name], numel)


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
    return {_dictionary_key(key): value for key, value in pairs}


def _sequence(arguments: tuple[object, ...]) -> tuple[object, ...]:
    items = arguments[0] if arguments else ()
    if not isinstance(items, list | tuple):
        raise Refused("a torch.Size is described in a way that torch.save does not use")
    return tuple(items)


FindStorage = Callable[[object], StorageInfo]

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

_BESIDE = re.compile(
    r"numpy(\.\w+)*\.(scalar|dtype|ndarray|_reconstruct|_frombuffer|\w+DType|u?int\d+|float\d+|bool_?)"
    r"|torch\.(device|dtype|Tensor|nn\.parameter\.Parameter|layout|strided|Generator|serialization\._get_layout)"
    r"|torch\.(b?float|u?int|complex|double|half|long|short|bool)\d*"
    r"|builtins\.(set|frozenset|list|dict|tuple|int|float|bool|str|bytes|bytearray|complex|slice|range|object)"
    r"|__builtin__\.(set|frozenset|list|dict|tuple|int|float|bool|str|long|bytearray|complex|slice|object)"
    r"|_codecs\.encode|copyreg\._reconstructor|copy_reg\._reconstructor|collections\.deque"
    r"|(argparse|types)\.\w*Namespace|pathlib\.\w*Path|pathlib\._local\.\w*Path"
    r"|datetime\.\w+|enum\.\w+|typing\.\w+|decimal\.Decimal|fractions\.Fraction|uuid\.UUID"
    r"|(omegaconf|lightning|pytorch_lightning|lightning_fabric|transformers|accelerate)(\.\w+)+"
    r"|(__main__|__mp_main__)\.\w+"
)
"""Names of what trainers keep beside the weights: numbers, sets, devices, paths, settings."""
_ARRAYS = ("_reconstruct", "_frombuffer", "ndarray", "Tensor", "Parameter")

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {  # no LONG4: a number of megabytes is hashed anew wherever it is a key
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BYTEARRAY8",
}  # fmt: skip


def unpickle(file: BinaryIO, find_storage: FindStorage, limit: int = MAX_PROGRAM_BYTES) -> object:
    """Interpret one pickle from `file`, of at most `limit` bytes, and leave the file behind it.

    Returns plain values: dicts, lists, tuples, strings, numbers, `TensorInfo` and `Placeholder`.

    Raises:
        Refused: an instruction, a name or a structure that no state dict needs.
    """
    begin = file.tell()
    program = io.BytesIO(file.read(limit + 1))
    machine = _Machine(find_storage)
    try:
        for opcode, argument, _ in pickletools.genops(program):
            machine.step(opcode.name, argument)
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        if program.tell() > limit:
            raise Refused("its pickle is longer than any state dict needs") from None
        raise Refused(f"its pickle is damaged ({shown(brief(error))})") from None
    file.seek(begin + program.tell())
    return machine.result


class _Machine:
    """The stack, the memo and the instructions."""

    def __init__(self, find_storage: FindStorage) -> None:
        self.find_storage = find_storage
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        self.result: object = None
        self.items = 0

    def step(self, opcode: str, argument: object) -> None:
        """Carry out one instruction."""
        stack = self.stack
        self._spend(1)
        if opcode in _LITERALS:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self.memo[int(str(argument))] = stack[-1]
        elif opcode == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[int(str(argument))])
        elif opcode == "MARK":
            stack.append(_MARK)
        elif opcode in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"D": {}, "L": [], "T": ()}[opcode[6]])
        elif opcode in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(opcode[5])
            items = [self._pop() for _ in range(count)]
            stack.append(tuple(reversed(items)))
        elif opcode in ("TUPLE", "LIST"):
            items = self._pop_mark()
            stack.append(tuple(items) if opcode == "TUPLE" else items)
        elif opcode == "FROZENSET":
            self._pop_mark()
            stack.append(Placeholder("frozenset"))
        elif opcode == "EMPTY_SET":
            stack.append(Placeholder("set"))
        elif opcode in ("SETITEM", "SETITEMS", "DICT"):
            self._set_items(opcode)
        elif opcode in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [self._pop()] if opcode == "APPEND" else self._pop_mark()
            if isinstance(top := self._top(list), list):
                top.extend(items)
        elif opcode in ("GLOBAL", "STACK_GLOBAL"):
            self._name(opcode, argument)
        elif opcode in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            _ = self._pop() if opcode == "NEWOBJ_EX" else None
            arguments, function = self._pop(), self._pop()
            stack.append(self._apply(function, arguments))
        elif opcode == "BINPERSID":
            stack.append(self.find_storage(self._pop()))
        elif opcode == "BUILD":
            self._pop()  # attributes, such as OrderedDict's _metadata: not needed
            self._top(dict)
        elif opcode == "STOP":
            self.result = self._pop()
        elif opcode not in ("PROTO", "FRAME"):
            raise Refused(f"its pickle uses {opcode}, which no state dict needs")

    def _spend(self, items: int) -> None:
        self.items += items
        if self.items > MAX_ITEMS:
            raise Refused(f"its pickle makes more than {MAX_ITEMS:,} items, as no state dict does")

    def _pop(self) -> object:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("mark out of place")
        return value

    def _pop_mark(self) -> list[object]:
        items: list[object] = []
        while (value := self.stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def _top(self, kind: type) -> Any:
        """Return what is to be changed: a `kind`, or a placeholder, which nothing changes."""
        if not isinstance(self.stack[-1], kind | Placeholder):
            raise Refused(
                f"its pickle changes {shown(kind_of(self.stack[-1]))} as if a {kind.__name__}"
            )
        return self.stack[-1]

    def _set_items(self, opcode: str) -> None:
        items = [self._pop(), self._pop()][::-1] if opcode == "SETITEM" else self._pop_mark()
        if opcode == "DICT":
            self.stack.append({})
        if isinstance(target := self._top(dict), dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[_dictionary_key(key)] = value

    def _name(self, opcode: str, argument: object) -> None:
        module: object
        name: object
        if opcode == "GLOBAL":
            module, _, name = str(argument).partition(" ")
        else:
            name, module = self._pop(), self._pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("its pickle mentions a name that is not text")
        if len(module) + len(name) > MAX_NAME:
            raise Refused(f"it mentions a name of more than {MAX_NAME:,} characters")
        found = GlobalName(module, name)
        is_storage = module == "torch" and name in STORAGES
        if str(found) not in APPLIED and not is_storage and not _BESIDE.fullmatch(str(found)):
            raise Refused(
                f"it mentions {shown(str(found))}, and only tensors in plain containers are read; "
                "save the model's state_dict() alone"
            )
        self.stack.append(found)

    def _apply(self, function: object, arguments: object) -> object:
        """Make what a call describes; containers are copied, so their items count again."""
        if not isinstance(function, GlobalName) or not isinstance(arguments, tuple):
            raise Refused(f"its pickle applies {shown(kind_of(function))}, which is not a tensor")
        self._spend(sum(len(each) for each in arguments if isinstance(each, list | tuple | dict)))
        make = APPLIED.get(str(function))
        return make(arguments) if make else Placeholder(str(function))


def _dictionary_key(key: object) -> object:
    """Return a dictionary key if it is a plain scalar: nested tuples could hash for ever."""
    plain = key is None or isinstance(key, str | int | float | bytes)
    return key if plain else Placeholder(kind_of(key))


def is_size(value: object) -> TypeGuard[int]:
    """Say whether a value can be a number of elements."""
    return type(value) is int and 0 <= value < 1 << 62


def _are_sizes(value: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and all(map(is_size, value))


def kind_of(value: object) -> str:
    """Return what kind of value this is, in words for an error message."""
    named = isinstance(value, GlobalName | Placeholder)
    return str(value) if named else type(value).__name__.strip("_")
