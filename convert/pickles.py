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
from collections.abc import Callable
from typing import Any, BinaryIO

from ..errors import brief, shown
from .pickled import (
    APPLIED,
    BESIDE,
    FOREIGN_TENSORS,
    MAX_NAME,
    STORAGES,
    GlobalName,
    Placeholder,
    Refused,
    StorageInfo,
    dictionary_key,
    kind_of,
)

MAX_PROGRAM_BYTES = 64 << 20
MAX_ARGUMENTS = 32
MAX_ITEMS = 2_000_000
"""Instructions and items of containers: about 40 per tensor, so 50,000 tensors; a few seconds and
some 150 MB where a program is made to waste them."""

FindStorage = Callable[[object], StorageInfo]

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
        self.names: dict[tuple[str, str], GlobalName] = {}
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
                target[dictionary_key(key)] = value

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
        found = self.names.get((module, name))
        if found is None:
            found = self.names[module, name] = _known(f"{module}.{name}")
        self.stack.append(found)

    def _apply(self, function: object, arguments: object) -> object:
        """Make what a call describes; containers are copied, so their items count again."""
        if not isinstance(function, GlobalName) or not isinstance(arguments, tuple):
            raise Refused(f"its pickle applies {shown(kind_of(function))}, which is not a tensor")
        if len(arguments) > MAX_ARGUMENTS:
            raise Refused(
                f"its pickle calls {shown(str(function))} with {len(arguments)} arguments"
            )
        self._spend(sum(len(each) for each in arguments if isinstance(each, list | tuple | dict)))
        make = APPLIED.get(str(function))
        return make(arguments) if make else Placeholder(str(function))


def _known(name: str) -> GlobalName:
    """Return a name that may be mentioned.

    Raises:
        Refused: any other.
    """
    if advice := FOREIGN_TENSORS.get(name):
        raise Refused(f"it mentions {shown(name)}, {advice}")
    if name not in APPLIED and name not in STORAGES and not BESIDE.fullmatch(name):
        raise Refused(
            f"it mentions {shown(name)}, and only tensors in plain containers are read; "
            "save the model's state_dict() alone"
        )
    return GlobalName(name)
