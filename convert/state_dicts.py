"""The state dict in what a trainer saved: found inside wrappers, whatever is kept beside it."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import shown
from .pickled import Placeholder, Refused, TensorInfo, kind_of

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net")
_DEEPEST = 4
Container = dict[object, object] | list[object] | tuple[object, ...]


def state_dict(value: object) -> dict[str, TensorInfo]:
    """Return name -> tensor of a state dict, possibly inside a trainer's wrapper."""
    if not isinstance(value, dict):
        raise Refused(f"it holds {shown(kind_of(value))}, not a state dict")
    found = _unwrapped(value, _DEEPEST, {})
    if found is None:
        inside = next((name for name, each in _containers(value) if _any_tensor(each)), None)
        where = f" but inside {shown(inside)}" if isinstance(inside, str) else ""
        raise Refused(f"it holds no tensors by name{where}; save the model's state_dict()")
    for name, container in _containers(found):
        if _any_tensor(container):
            raise Refused(f"the entry {shown(name)} holds tensors in a container; save them flat")
    tensors: dict[str, TensorInfo] = {}
    for name, each in found.items():
        if isinstance(each, Placeholder) and each.is_array:
            raise Refused(
                f"the entry {shown(name)} is made by {shown(each.kind)} and is no tensor; save "
                "torch.from_numpy(...) of it, or leave it out"
            )
        if isinstance(each, TensorInfo):
            if not isinstance(name, str):
                raise Refused(f"a tensor's name is {shown(kind_of(name))}, which is not text")
            tensors[name] = each
    return tensors


def _unwrapped(
    value: dict[object, object], depth: int, seen: dict[int, dict[object, object] | None]
) -> dict[object, object] | None:
    """Return the state dict that a dict is or wraps, whatever tensors a trainer keeps beside it.

    seen: by identity, what dicts were found to be: one may stand under many names.
    """
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = None  # a dict inside itself
    inner: dict[str, dict[object, object]] = {
        name: seen.get(id(found)) or found
        for name in _WRAPPERS
        if depth and isinstance(each := value.get(name), dict)
        for found in [_unwrapped(each, depth - 1, seen)]
        if found is not None
    }
    first = next(iter(inner.values()), None)
    if first is None:
        first = value if any(_is_array(each) for each in value.values()) else None
    for other in inner.values():
        if other is not first and _tensors(other) != _tensors(first or {}):
            names = " and ".join(map(repr, inner))
            raise Refused(
                f"it holds different weights under {names}; save the ones to convert alone"
            )
        seen[id(other)] = first  # whoever holds it holds the same weights
    seen[id(value)] = first
    return first


def _tensors(value: dict[object, object]) -> dict[object, TensorInfo]:
    """Return the tensors alone; to compare what else there is could take for ever."""
    return {name: each for name, each in value.items() if isinstance(each, TensorInfo)}


def _is_array(value: object) -> bool:
    return isinstance(value, TensorInfo) or (isinstance(value, Placeholder) and value.is_array)


def _containers(value: dict[object, object]) -> Iterator[tuple[object, Container]]:
    """Yield the containers of a dict, by name; one that stands in every entry once."""
    seen: set[int] = set()
    for name, each in value.items():
        if isinstance(each, dict | list | tuple) and id(each) not in seen:
            seen.add(id(each))
            yield name, each


def _any_tensor(value: Container) -> bool:
    """Look one level into a container; deeper ones are optimiser states and the like."""
    items = value.values() if isinstance(value, dict) else value
    return any(isinstance(item, TensorInfo) for item in items)
