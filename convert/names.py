"""What tensors are called: one table of rules per source layout, applied in order, strictly.

    module.model.layers.3.self_attn.q_proj.weight                        wrappers (DDP, compile,
    FSDP)
      -> model.layers.3.self_attn.q_proj.weight                          Hugging Face's name
    base_model.model.model.layers.3.mlp.up_proj.lora_A.weight  (r, in)   PEFT and schema 1
      -> layers.3.mlp.up_proj.lora_a  (in, r)                            a stream tensor, transposed

A user's own rules come first: a JSON file {"rename": [["pattern", "name"], ...], "drop":
["pattern"]} with Python's regular expressions, matched against whole names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from ..errors import CheckpointError, shown
from .reader import read_json
from .tensors import SourceTensor

Shape = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """Names that match `pattern` whole become `name` (as `re.sub` writes it); None drops them."""

    pattern: re.Pattern[str]
    name: str | None
    transpose: bool = False


def _rules(*rows: tuple[str, str] | tuple[str, str, bool]) -> tuple[Rule, ...]:
    return tuple(Rule(re.compile(row[0]), row[1], len(row) == 3) for row in rows)


LAYOUTS: dict[str, tuple[Rule, ...]] = {
    # What wrappers around a model add to its names; applied until nothing changes.
    "wrappers": _rules(
        (r"(?:module|_orig_mod|base_model\.model)\.(.+)", r"\1"),
        (r"(.*\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.(.+)", r"\1\2"),
        (r"(.+)\.base_layer\.(weight|bias)", r"\1.\2"),
        (r"(.+\.lora_[AB])\.default\.weight", r"\1.weight"),
    ),
    # Our schema 1, which is PEFT's naming for adapters; all become MLX stream names.
    "streams": _rules(
        (r"(?:model\.)?stream_embeddings(?:\.weight)?", r"stream_embeddings"),
        (r"(stream_init|next_token|pruner|conditioner)\.lora_A(?:\.weight)?", r"\1.lora_a", True),
        (r"(stream_init|next_token|pruner|conditioner)\.lora_B(?:\.weight)?", r"\1.lora_b", True),
        (r"conditioner\.(mlp_in|mlp_out)(?:\.weight)?", r"conditioner.\1"),
        (r"(?:model\.)*layers\.(\d+)\.(.+)\.lora_A(?:\.weight)?", r"layers.\1.\2.lora_a", True),
        (r"(?:model\.)*layers\.(\d+)\.(.+)\.lora_B(?:\.weight)?", r"layers.\1.\2.lora_b", True),
        (r"(?:model\.)*layers\.(\d+)\.(?:self_attn\.)?stream_gate(?:\.weight)?",
         r"layers.\1.stream_gate"),
    ),
    # Base weights: tried where the base model does not know a name and knows the result.
    "base": _rules(
        (r"model\.(.+)", r"\1"),
        (r"(.+)", r"model.\1"),
        (r"(?:language_model\.|model\.language_model\.)(.+)", r"\1"),
        (r"(?:language_model\.|model\.language_model\.)(.+)", r"model.\1"),
        (r"(.+)\.gamma", r"\1.weight"),
    ),
}  # fmt: skip

FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Rows of a fused projection, in order. Split or joined to what the base model has."""


@dataclass(frozen=True)
class Named:
    """One tensor of the target: made of one source, a slice of one, or several joined.

    `rows`: the first axis is cut to [start, stop). `transpose`: (a, b) becomes (b, a).
    """

    name: str
    sources: tuple[SourceTensor, ...]
    transpose: bool = False
    rows: tuple[int, int] | None = None

    @property
    def shape(self) -> Shape:
        first = self.sources[0].shape
        if self.transpose:
            return first[::-1]
        if self.rows:
            return (self.rows[1] - self.rows[0], *first[1:])
        if len(self.sources) > 1:
            return (sum(source.shape[0] for source in self.sources), *first[1:])
        return first

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is its source, unchanged."""
        return len(self.sources) == 1 and not self.transpose and self.rows is None


def read_rules(path: Path | None) -> tuple[Rule, ...]:
    """Read a user's rules file.

    Raises:
        CheckpointError: not of the form shown above, or a pattern that does not compile.
    """
    if path is None:
        return ()
    table = read_json(path) or {}
    rename, drop = table.get("rename", []), table.get("drop", [])
    is_pairs = isinstance(rename, list) and all(
        isinstance(row, list) and len(row) == 2 and all(isinstance(text, str) for text in row)
        for row in rename
    )
    is_texts = isinstance(drop, list) and all(isinstance(text, str) for text in drop)
    if not is_pairs or not is_texts or set(table) - {"rename", "drop"}:
        raise CheckpointError(
            f'{path} must hold {{"rename": [["pattern", "name"], ...], "drop": ["pattern", ...]}}.'
        )
    try:
        rules = [Rule(re.compile(pattern), name) for pattern, name in rename]
        return (*rules, *(Rule(re.compile(pattern), None) for pattern in drop))
    except re.error as error:
        raise CheckpointError(f"{path} holds a pattern that does not compile: {error}.") from None


def sort_names(
    tensors: Iterable[SourceTensor], user: tuple[Rule, ...] = ()
) -> tuple[dict[str, SourceTensor], dict[str, Named]]:
    """Divide tensors into base weights, in Hugging Face names, and stream tensors, in MLX names.

    Raises:
        CheckpointError: two tensors get the same name.
    """
    base: dict[str, SourceTensor] = {}
    streams: dict[str, Named] = {}
    for tensor in tensors:
        name = _renamed_by_user(tensor.name, user)
        if name is None:
            continue
        name = _unwrapped(name)
        for rule in LAYOUTS["streams"]:
            if match := rule.pattern.fullmatch(name):
                target = match.expand(rule.name or "")
                _add(streams, target, Named(target, (tensor,), transpose=rule.transpose), tensor)
                break
        else:
            _add(base, name, tensor.renamed(name), tensor)
    return base, streams


def fit_base(base: Mapping[str, SourceTensor], wanted: Mapping[str, Shape]) -> dict[str, Named]:
    """Bring base weights to the names that the base model has, splitting and joining fused ones.

    A name that no rule fits is kept: mlx-lm's `sanitize` may know it; else it is refused later.
    """
    fitted: dict[str, Named] = {}
    for name, tensor in base.items():
        target = name if name in wanted else _first_known(name, wanted) or name
        parts = _split(target, tensor, wanted)
        for part in parts or [Named(target, (tensor,))]:
            _add(fitted, part.name, part, tensor)
    return _joined(fitted, wanted)


def nearest(name: str, shape: Shape, wanted: Mapping[str, Shape]) -> str:
    """Return the end of an error sentence: the nearest expected name, with both shapes."""
    close = difflib.get_close_matches(name, list(wanted)[:20_000], n=1, cutoff=0.3)
    if not close:
        return f"{shown(name)} {shape} has no place in this model"
    return f"{shown(name)} {shape} has no place; the nearest name is {close[0]} {wanted[close[0]]}"


def _renamed_by_user(name: str, user: tuple[Rule, ...]) -> str | None:
    for rule in user:
        if match := rule.pattern.fullmatch(name):
            try:
                return match.expand(rule.name) if rule.name is not None else None
            except (re.error, IndexError) as error:
                raise CheckpointError(
                    f"the rule for {shown(name)} does not work: {error}."
                ) from None
    return name


def _unwrapped(name: str) -> str:
    """Take wrappers off; a PEFT model's `base_model.model.` included."""
    for _ in range(16):
        for rule in LAYOUTS["wrappers"]:
            if match := rule.pattern.fullmatch(name):
                name = match.expand(rule.name or "")
                break
        else:
            break
    return name


def _first_known(name: str, wanted: Mapping[str, Shape]) -> str | None:
    for rule in LAYOUTS["base"]:
        if match := rule.pattern.fullmatch(name):
            candidate = match.expand(rule.name or "")
            if candidate in wanted or any(part in wanted for part in _parts(candidate)):
                return candidate
    return None


def _parts(name: str) -> list[str]:
    """Return the names a fused tensor would be split into, or none."""
    for fused, parts in FUSED.items():
        if f".{fused}." in name:
            return [name.replace(f".{fused}.", f".{part}.") for part in parts]
    return []


def _split(name: str, tensor: SourceTensor, wanted: Mapping[str, Shape]) -> list[Named]:
    """Cut a fused projection that the base model has in parts."""
    parts = [] if name in wanted else _parts(name)
    if not parts or any(part not in wanted for part in parts) or not tensor.shape:
        return []
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + wanted[part][0])
    if ends[-1] != tensor.shape[0]:
        raise CheckpointError(
            f"{shown(tensor.name)} {tensor.shape} cannot be split into {', '.join(parts)}, "
            f"which have {ends[-1]} rows in all; check that config.json belongs to the weights."
        )
    spans = pairwise(ends)
    return [Named(part, (tensor,), rows=span) for part, span in zip(parts, spans, strict=True)]


def _joined(fitted: dict[str, Named], wanted: Mapping[str, Shape]) -> dict[str, Named]:
    """Join projections that the base model has fused."""
    for name in wanted:
        parts = _parts(name) if name not in fitted else []
        if not parts or not all(part in fitted and fitted[part].is_plain for part in parts):
            continue
        sources = tuple(fitted.pop(part).sources[0] for part in parts)
        if len({(source.dtype, source.shape[1:]) for source in sources}) > 1:
            raise CheckpointError(
                f"{', '.join(parts)} differ in dtype or width; {name} needs them alike."
            )
        fitted[name] = Named(name, sources)
    return fitted


def _add(table: dict[str, T], name: str, value: T, tensor: SourceTensor) -> None:
    if name in table:
        raise CheckpointError(
            f"two tensors mean {shown(name)}, the second is {shown(tensor.name)} in "
            f"{tensor.origin}; remove one, or drop it with a rules file."
        )
    table[name] = value
