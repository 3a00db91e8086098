"""Comparing an answer with mlx-lm's: its tokens, and the rows it left in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import mlx.core as mx

from mlx_specstream.model.cache import KVCache, QuantizedLayer, RotatingLayer, StateLayer
from mlx_specstream.verify import rounding_bound
from tests.support.exactness.draw import Case, Scene

Verdict = Literal["identical", "near-tie", "cut short", "mismatch"]
ROWS_BOUND = 1e-3  # of keys and values around 1
# Quantising is rounding to few codes: a value at the edge of two lands on either, and moves by
# all that lies between them. What sees it moves, too: the logits, and in the layers above all values
# of its own row and of those behind.
WRONG_CODES = 0.2  # of a row
QUANTISED_BOUND = 0.02


@dataclass(frozen=True)
class Outcome:
    """What a case found. `told` says what differed; tokens, accepted drafts: of all turns."""

    case: Case
    verdict: Verdict
    tokens: int
    accepted: int
    told: str = ""


def explain(
    found: Sequence[int],
    wanted: Sequence[int],
    log_probs: Sequence[mx.array],
    dtype: mx.Dtype,
    scene: Scene,
) -> tuple[Verdict, str]:
    """Return whether rounding explains the first token that differs, and the figures."""
    both = zip(found, wanted, strict=False)
    place = next((n for n, (one, other) in enumerate(both) if one != other), None)
    if place is None:
        return "mismatch", f"{len(found)} tokens, mlx-lm has {len(wanted)}"
    values = log_probs[place].astype(mx.float32)
    gap = cast(float, (mx.max(values) - values[found[place]]).item())
    largest = cast(float, mx.max(mx.where(mx.isinf(values), 0.0, mx.abs(values))).item())
    bound = rounding_bound(dtype, largest)
    if scene.cache == "quantised":
        bound = max(bound, QUANTISED_BOUND)
    told = f"token {place}: {found[place]}, mlx-lm {wanted[place]} (gap {gap:.3g})"
    return ("near-tie" if gap <= bound else "mismatch"), told


def rows_differ(kv: KVCache, theirs: KVCache, dtype: mx.Dtype, ahead: int = 1) -> str:
    """Say which layer's rows differ from mlx-lm's, which has `ahead` more; nothing if none does.

    Quantised layers are compared up to the first row in which one below them has a wrong code.
    """
    if dtype != mx.float32:
        return ""  # rounding in 16 bits is not small beside the rows
    if kv.quantize is not None:  # turning a copy: in ours the token to come sees rows as they are
        kv = kv.copy(kv.length)
        kv.turn_quantized()
    if theirs.length != kv.length + ahead:
        return f"mlx-lm has {theirs.length} rows, not {kv.length + ahead}"
    # mlx-lm has no cache for a layer without attention, and ours holds nothing.
    held, others = (
        [layer for layer in one.layers if layer.arrays or isinstance(layer, StateLayer)]
        for one in (kv, theirs)
    )
    same_below = kv.length
    for index, (ours, other) in enumerate(zip(held, others, strict=True)):
        if type(ours) is not type(other):
            return f"layer {index} is a {type(ours).__name__}, mlx-lm's a {type(other).__name__}"
        if isinstance(ours, StateLayer):
            continue  # mlx-lm's has the token to come in it
        if isinstance(ours, RotatingLayer) and isinstance(other, RotatingLayer):
            first = max(ours.span.first, other.span.needed)
            if first >= kv.length:
                continue
            pairs = zip(
                ours.between(first, kv.length), other.between(first, kv.length), strict=True
            )
        else:
            pairs = zip(ours.read(kv.length), other.read(kv.length), strict=True)
        rows, bound = kv.length, 0.0
        if isinstance(ours, QuantizedLayer):
            rows, bound = same_below, WRONG_CODES
        for one, two in pairs:
            apart = (mx.abs(one - two) > ROWS_BOUND).astype(mx.float32)
            shares = cast(list[float], mx.mean(apart, axis=(0, 1, 3)).tolist())
            for row, share in enumerate(shares[:rows]):
                if share > bound:
                    return f"layer {index}: {share:.1%} of row {row}'s values differ"
                if share:
                    same_below = min(same_below, row)
    return ""
