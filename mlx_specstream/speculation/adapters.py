"""LoRA on the rows of streams: y = W·x + B·A·x there, and y = W·x on the main rows beside them.

A GPU takes about as long to start one of these small products as to compute it, so there are few:

* Modules that read the same rows (queries, keys and values; gate and up) share one product with
  all their A, and B·(A·x) is added in the product itself: 4 + 7 kernels a layer, not 21.
* Of a small unquantised model whose streams run apart, W + B·A is kept as well (`merged`): none.
"""

from __future__ import annotations

import threading
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..model.backbone import view_layer

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class RowSplit(threading.local):
    """Where the stream rows of a thread's pass begin; adapters of streams act from there on."""

    num_main = 0


class InnerProduct(threading.local):
    """x·A for modules that read the same rows x, computed when the first of them asks.

    lora_a: (in, r₁ + r₂ + ...), side by side. What was computed is let go with the last module.
    """

    def __init__(self, lora_a: mx.array, readers: int) -> None:
        self.lora_a = lora_a
        self.readers = readers
        self.rows: mx.array | None = None
        self.product = lora_a
        self.left = 0

    def __call__(self, x: mx.array, first: int) -> mx.array:
        """Return (..., R - first, r₁ + r₂ + ...) for the rows (..., R, in) from `first` on."""
        if x is not self.rows or not self.left:
            self.rows, self.left = x, self.readers
            self.product = (x[..., first:, :] if first else x) @ self.lora_a
        self.left -= 1
        product = self.product
        if not self.left:
            self.rows, self.product = None, self.lora_a
        return product


class StreamLinear(nn.Module):
    """A base linear layer, plus LoRA on the rows from `split.num_main` on (or on all rows).

    lora_a: (in, r), lora_b: (r, out), the scale already multiplied into lora_b. inner: gives x·A
    together with other modules' (`join`); this one's columns begin at `column`.
    """

    def __init__(
        self, base: nn.Module, lora_a: mx.array, lora_b: mx.array, split: RowSplit | None
    ) -> None:
        super().__init__()
        self.base = base
        self.lora_a = lora_a
        self.lora_b = lora_b
        self.column = 0
        object.__setattr__(self, "split", split)
        object.__setattr__(self, "inner", None)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        first = 0 if self.split is None else self.split.num_main
        if first == x.shape[-2]:
            return y
        if self.inner is None:
            inner = (x[..., first:, :] if first else x) @ self.lora_a
        else:
            inner = self.inner(x, first)[..., self.column : self.column + self.lora_a.shape[1]]
        if first == 0:
            return mx.addmm(y, inner, self.lora_b)
        streams = mx.addmm(y[..., first:, :], inner, self.lora_b)
        return mx.concatenate([y[..., :first, :], streams], axis=-2)


def join(layer: nn.Module) -> list[mx.array]:
    """Let adapters of modules that read the same rows share a product; return the joined A."""
    made = []
    for module in layer.modules():
        for names in SAME_INPUT:
            found = [module.get(name) for name in names]
            together = [one for one in found if isinstance(one, StreamLinear)]
            if len(together) < 2:
                continue
            joined = mx.concatenate([one.lora_a for one in together], axis=1)
            inner, column = InnerProduct(joined, len(together)), 0
            for one in together:
                object.__setattr__(one, "inner", inner)
                one.column = column
                column += one.lora_a.shape[1]
            made.append(joined)
    return made


def merged(layer: nn.Module) -> nn.Module | None:
    """Return a copy of an adapted layer with W + B·A in its modules, None where one is quantised."""
    view = view_layer(layer)
    for module in view.modules():
        for name, child in list(module.items()):
            if not isinstance(child, StreamLinear):
                continue
            if type(child.base) is not nn.Linear:
                return None
            base, own = child.base, nn.Linear(1, 1, bias="bias" in child.base)
            delta = (child.lora_a.astype(mx.float32) @ child.lora_b.astype(mx.float32)).T
            own.weight = (base.weight.astype(mx.float32) + delta).astype(base.weight.dtype)
            if "bias" in base:
                own.bias = base.bias
            module[name] = own
    return view


def merged_bytes(layer: nn.Module) -> int:
    """Return the bytes that `merged` takes beside the layer, if it can be merged."""
    adapted = (m.base for m in layer.modules() if isinstance(m, StreamLinear))
    return sum(int(base.weight.nbytes) for base in adapted if type(base) is nn.Linear)


def own_weights(layer: nn.Module) -> list[mx.array]:
    """Return all weights of a layer, shared ones included."""
    return [cast(mx.array, array) for _, array in cast(Any, tree_flatten(layer.parameters()))]
