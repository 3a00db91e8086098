"""What tensors are called: one table of rules per source layout, applied in order, strictly.

    module.model.layers.3.self_attn.q_proj.weight                        wrappers (DDP, compile,
    FSDP)
      -> model.layers.3.self_attn.q_proj.weight                          Hugging Face's name
    base_model.model.model.layers.3.mlp.up_proj.lora_A.weight  (r, in)   PEFT and schema 1
      -> layers.3.mlp.up_proj.lora_a  (in, r)                            a stream tensor, transposed

PEFT's copy of what it trains whole (`modules_to_save`) replaces the untrained `original_module`.

A user's own rules come first: a JSON file {"rename": [["pattern", "name"], ...], "drop":
["pattern"]} with Python's regular expressions, matched against whole names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..errors import CheckpointError, shown
from ..weights.tensorfile import Shape
from .reader import read_json
from .tensors import Tensor, joined


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
        (r"(?:module\.|base_model\.model\.|model\.(?=base_model\.model\.|module\.))(.+)", r"\1"),
        (r"(.*\.)?(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.(.+)", r"\1\2"),
        (r"(.+)\.base_layer\.(weight|bias)", r"\1.\2"),
        (r"(.+)\.modules_to_save\.[^.]+\.(.+)", r"\1.\2"),
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
    tensors: Iterable[Tensor], user: tuple[Rule, ...] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divide tensors into base weights, in Hugging Face names, and stream tensors, in MLX names.

    Raises:
        CheckpointError: two tensors get the same name.
    """
    base: dict[str, Tensor] = {}
    streams: dict[str, Tensor] = {}
    for tensor in tensors:
        renamed = _renamed_by_user(tensor.name, user)
        if renamed is None or ".original_module." in renamed:
            continue
        name = unwrapped(renamed)
        for rule in LAYOUTS["streams"]:
            if match := rule.pattern.fullmatch(name):
                turned = tensor.transposed() if rule.transpose else tensor
                _add(streams, match.expand(rule.name or ""), turned)
                break
        else:
            _add(base, name, tensor)
    return base, streams


def fit_base(base: Mapping[str, Tensor], wanted: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Bring base weights to the names that the base model has, splitting and joining fused ones.

    A name that no rule fits is kept: mlx-lm's `sanitize` may know it; else it is refused later.
    """
    fitted: dict[str, Tensor] = {}
    for name, tensor in base.items():
        target = name if name in wanted else _first_known(name, wanted) or name
        for part, piece in (_split(target, tensor, wanted) or {target: tensor}).items():
            _add(fitted, part, piece)
    return _joined(fitted, wanted)


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


def unwrapped(name: str) -> str:
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


def _split(name: str, tensor: Tensor, wanted: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Cut a fused projection that the base model has in parts."""
    parts = [] if name in wanted else _parts(name)
    if not parts or any(part not in wanted for part in parts) or not tensor.shape:
        return {}
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + wanted[part][0])
    if ends[-1] != tensor.shape[0]:
        raise CheckpointError(
            f"{shown(tensor.name)} {tensor.shape} cannot be split into {', '.join(parts)}, "
            f"which have {ends[-1]} rows in all; check that config.json belongs to the weights."
        )
    return {part: tensor.rows(*span) for part, span in zip(parts, pairwise(ends), strict=True)}


def _joined(fitted: dict[str, Tensor], wanted: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Join projections that the base model has fused."""
    for name in wanted:
        parts = _parts(name) if name not in fitted else []
        if not parts or not all(part in fitted for part in parts):
            continue
        tensors = [fitted.pop(part) for part in parts]
        if len({(tensor.dtype, tensor.shape[1:]) for tensor in tensors}) > 1:
            raise CheckpointError(
                f"{', '.join(parts)} differ in dtype or width; {name} needs them alike."
            )
        fitted[name] = joined(name, tensors)
    return fitted


def _add(table: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in table:
        raise CheckpointError(
            f"two tensors mean {shown(name)}, {table[name].origin} and {tensor.origin}; remove "
            "one, or drop it with a rules file."
        )
    table[name] = tensor.renamed(name)
