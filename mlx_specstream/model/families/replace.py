"""Shallow copies of a model in which single modules behave differently.

Everything else, weights above all, is shared with the user's model, which stays untouched. This
is how mlx-lm's own code is made to tell what it does, and to do a part of it: no model is forked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.nn as nn

Path = tuple[str, ...]


def override_methods(module: nn.Module, **methods: Callable[..., Any]) -> Any:
    """Return a shallow copy of `module`, still an instance of its class, with other methods."""
    view = copy.copy(module)
    view.__class__ = type(type(module).__name__, (type(module),), methods)
    return view


def replace_modules(root: Any, changes: Mapping[Path, Any]) -> Any:
    """Return a shallow copy of `root` with the modules at these paths replaced.

    A path names children and places in lists: ("model", "layers", "3"). Only the modules and lists
    on the way are copied.
    """
    if () in changes:
        return changes[()]
    below: dict[str, dict[Path, Any]] = {}
    for (first, *rest), change in changes.items():
        below.setdefault(first, {})[tuple(rest)] = change
    view = copy.copy(root)
    for name, inner in below.items():
        key: Any = int(name) if isinstance(view, list) else name
        view[key] = replace_modules(view[key], inner)
    return view


def modules(root: nn.Module, *, outside: Path) -> Iterator[tuple[Path, nn.Module]]:
    """Yield paths and modules, outermost first, none of those in the list at `outside`."""
    queue: list[tuple[Path, Any]] = [((), root)]
    while queue:
        path, here = queue.pop(0)
        if isinstance(here, nn.Module):
            yield path, here
        if path != outside:
            queue += [((*path, name), child) for name, child in _children(here)]


def find_list(root: nn.Module, items: list[nn.Module]) -> tuple[Path, list[Any]] | None:
    """Return the path and contents of the list below `root` that ends with `items`."""
    queue: list[tuple[Path, Any]] = [((), root)]
    while queue:
        path, here = queue.pop(0)
        if isinstance(here, list) and items and here[-1] is items[-1] and items[0] in here:
            return path, here
        queue += [((*path, name), child) for name, child in _children(here)]
    return None


def _children(here: Any) -> list[tuple[str, Any]]:
    """Return the modules and lists of a module or a list, with their names."""
    pairs = here.items() if isinstance(here, dict) else ((str(n), c) for n, c in enumerate(here))
    return [(str(name), child) for name, child in pairs if isinstance(child, nn.Module | list)]
