"""Pickles, interpreted without running anything in them.

A pickle is a program. `unpickle` interprets the few instructions that `torch.save` writes, on plain
Python values; the only names it knows are tensors, storages and containers, and none of them is
called: each becomes a description. Everything else is refused with its name.

    GLOBAL torch._utils._rebuild_tensor_v2 · ... · REDUCE   ->   TensorInfo(storage, offset, ...)
    GLOBAL posix.system · ...                               ->   refused: it mentions 'posix.system'
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeGuard

from ..errors import shown
from ..weights.tensorfile import MAX_DIMENSIONS

MAX_PROGRAM_BYTES = 64 << 20

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
    """A tensor as the program describes it: a strided view of a storage."""

    storage: StorageInfo
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Refused(Exception):  # noqa: N818 - becomes a CheckpointError that names the file
    """Why a file is refused: one clause."""


def storage_info(identity: object) -> StorageInfo:
    """Check a storage's persistent id: ('storage', type, key, device, elements[, view])."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise Refused(f"it refers to {shown(kind_of(identity))} outside of itself")
    kind, key, numel = identity[1], identity[2], identity[4]
    if not isinstance(kind, GlobalName) or kind.module != "torch" or kind.name not in STORAGES:
        raise Refused(f"it holds a storage of the kind {shown(str(kind))}, which is not supported")
    if not isinstance(key, str | int) or not is_size(numel) or identity[5:] not in ((), (None,)):
        raise Refused("a storage is described in a way that torch.save does not use")
    return StorageInfo(str(key), STORAGES[kind.name], numel)


def _tensor(arguments: tuple[object, ...]) -> TensorInfo:
    """Check the arguments of `torch._utils._rebuild_tensor_v2` and describe the tensor."""
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
    if numel and (last >= storage.numel or numel > storage.numel):
        raise Refused(f"a tensor of the shape {shown(list(shape))} leaves its storage")
    return TensorInfo(storage, offset, shape, strides)


def _first(arguments: tuple[object, ...]) -> object:
    return arguments[0] if arguments else None


def _ordered(arguments: tuple[object, ...]) -> dict[object, object]:
    pairs = arguments[0] if arguments else []
    if not isinstance(pairs, list) or not all(
        isinstance(p, list | tuple) and len(p) == 2 for p in pairs
    ):
        raise Refused("an OrderedDict is described in a way that torch.save does not use")
    return {_checked_key(key): value for key, value in pairs}


def _sequence(arguments: tuple[object, ...]) -> tuple[object, ...]:
    items = arguments[0] if arguments else ()
    if not isinstance(items, list | tuple):
        raise Refused("a torch.Size is described in a way that torch.save does not use")
    return tuple(items)


FindStorage = Callable[[object], StorageInfo]

ALLOWED: dict[str, Callable[[tuple[object, ...]], object]] = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch.Size": _sequence,
}
"""Every name a program may apply, and what is made of it. Nothing here runs code of the file."""

_MARK = object()
_CONSTANTS = {
    "NONE": None, "NEWTRUE": True, "NEWFALSE": False,
}  # fmt: skip
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip


def unpickle(file: BinaryIO, find_storage: FindStorage) -> object:
    """Interpret one pickle from `file` and leave the file just behind it.

    Returns plain values: dicts, lists, tuples, strings, numbers, and `TensorInfo` descriptions.

    Raises:
        Refused: an instruction, a name or a structure that a state dict does not need.
    """
    machine = _Machine(find_storage)
    begin = file.tell()
    try:
        for opcode, argument, _ in pickletools.genops(file):
            machine.step(opcode.name, argument)
            if file.tell() - begin > MAX_PROGRAM_BYTES:
                raise Refused("its pickle is longer than any state dict needs")
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, TypeError) as error:
        raise Refused(f"its pickle is damaged ({shown(str(error))})") from None
    return machine.result


class _Machine:
    """The stack, the memo and the instructions."""

    def __init__(self, find_storage: FindStorage) -> None:
        self.find_storage = find_storage
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        self.result: object = None

    def step(self, opcode: str, argument: object) -> None:
        """Carry out one instruction."""
        stack = self.stack
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
        elif opcode in ("SETITEM", "SETITEMS", "DICT"):
            self._set_items(opcode)
        elif opcode in ("APPEND", "APPENDS"):
            items = self._pop_mark() if opcode == "APPENDS" else [self._pop()]
            self._top(list).extend(items)
        elif opcode in ("GLOBAL", "STACK_GLOBAL"):
            self._name(opcode, argument)
        elif opcode == "REDUCE":
            arguments, function = self._pop(), self._pop()
            stack.append(_apply(function, arguments))
        elif opcode == "BINPERSID":
            stack.append(self.find_storage(self._pop()))
        elif opcode == "BUILD":
            self._pop()  # attributes of a container, such as OrderedDict's _metadata: not needed
            self._top(dict)
        elif opcode == "STOP":
            self.result = self._pop()
        elif opcode not in ("PROTO", "FRAME"):
            raise Refused(f"its pickle uses {opcode}, which no state dict needs")

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
        if not isinstance(self.stack[-1], kind):
            raise Refused(
                f"its pickle changes {shown(kind_of(self.stack[-1]))} as if a {kind.__name__}"
            )
        return self.stack[-1]

    def _set_items(self, opcode: str) -> None:
        items = [self._pop(), self._pop()][::-1] if opcode == "SETITEM" else self._pop_mark()
        if opcode == "DICT":
            self.stack.append({})
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_checked_key(key)] = value

    def _name(self, opcode: str, argument: object) -> None:
        if opcode == "GLOBAL":
            module, _, name = str(argument).partition(" ")
        else:
            name, module = str(self._pop()), str(self._pop())
        found = GlobalName(module, name)
        is_storage = module == "torch" and name in STORAGES
        if str(found) not in ALLOWED and not is_storage:
            raise Refused(
                f"it mentions {shown(str(found))}, and only tensors in plain containers are read; "
                "save the model's state_dict() alone"
            )
        self.stack.append(found)


def _apply(function: object, arguments: object) -> object:
    make = ALLOWED.get(str(function)) if isinstance(function, GlobalName) else None
    if make is None or not isinstance(arguments, tuple):
        raise Refused(f"its pickle applies {shown(kind_of(function))}, which is not a tensor")
    return make(arguments)


def _checked_key(key: object) -> object:
    """Return a dictionary key if it is a plain scalar: nested tuples could hash for ever."""
    if key is None or isinstance(key, str | int | float | bytes):
        return key
    raise Refused(f"a dictionary has a key of the kind {shown(kind_of(key))}")


def is_size(value: object) -> TypeGuard[int]:
    """Say whether a value can be a number of elements."""
    return type(value) is int and 0 <= value < 1 << 62


def _are_sizes(value: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and all(map(is_size, value))


def kind_of(value: object) -> str:
    """Return what kind of value this is, in words for an error message."""
    return str(value) if isinstance(value, GlobalName) else type(value).__name__.strip("_")
