"""The speculative streams: γ guesses per position that ride along in the upper layers.

Stream j of position t starts as the main stream's hidden state plus a learned vector,
S_tj = f(M_t) + P_j [SS §3.1.1, Eq. 3], at the input of the first MSA layer, and predicts the
token x_{t+1+j}. Streams that know the next token [own] start at f(M_t) + P_j + B·A·ê(x_{t+1}), with
ê its embedding row over its rms; they can only run once that token is drawn (deferred).

In the MSA layers a row of stream (t, j) sees the main stream up to t and the streams 1..j of the
same t [SS Eq. 2]; in a draft tree, "up to t" is the committed text and the node's ancestors. With
two nodes A ── B and γ = 2, below the committed text:

                       A   B   A1  A2  B1  B2
    main      A      [ 1   .   s   s   .   .  ]     s: shared mode only [SS Eq. 1]
              B      [ 1   1   .   .   s   s  ]
    streams   A1     [ 1   .   1   .   .   .  ]
              A2     [ 1   .   1   1   .   .  ]
              B1     [ 1   1   .   .   1   .  ]
              B2     [ 1   1   .   .   1   1  ]

Weights are the base layer's, plus LoRA: on stream rows only (lossless), so that main rows are
computed from the base model's weights alone, or on every row of every layer (shared). In shared
mode a layer may hold a gate per query head, added to the scores that main rows give their own
streams: training opens it gently from a large negative value.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn

from ..config import StreamConfig
from ..errors import StreamsError
from ..machine.parts import INTO_PARTS, OUT_OF_PARTS, part_of
from ..model.backbone import Backbone, view_layer
from ..model.cache import KVCache, PassCache, QuantizedPass
from ..model.masks import Mask, RowMask, among_streams, causal_mask
from .adapters import RowSplit, StreamLinear, join, merged, merged_bytes, own_weights
from .condition import Conditioner, unit
from .sharded import LocalLinear, Summed
from .tree import ints

MERGED_BYTES = 256 << 20  # of weights with their adapters in them, beside the base's


class Streams:
    """Stream weights joined to a base model.

    Raises:
        StreamsError: the config does not fit the model, or a tensor is missing.
    """

    def __init__(
        self, backbone: Backbone, config: StreamConfig, tensors: Mapping[str, mx.array]
    ) -> None:
        N = backbone.num_layers
        if config.num_msa_layers > N:
            raise StreamsError(
                f"these streams want {config.num_msa_layers} MSA layers, but the model has {N}."
            )
        self.backbone = backbone
        self.config = config
        self.tensors = {name: tensor.astype(backbone.dtype) for name, tensor in tensors.items()}
        self.first_msa = N - config.num_msa_layers
        self.lower = range(self.first_msa)
        self.upper = range(self.first_msa, N)
        self.embeddings = self.tensor("stream_embeddings")
        self.init_map = (
            (self.tensor("stream_init.lora_a"), self.tensor("stream_init.lora_b"))
            if config.stream_init_rank
            else None
        )
        self.next_token_map = (
            (self.tensor("next_token.lora_a"), self.tensor("next_token.lora_b"))
            if config.next_token_rank
            else None
        )
        self.split = RowSplit()
        self.overflowed = False  # whether streams were seen to spoil the rows beside them
        self.shared = config.mode == "shared"
        gates = {index: self._gate(index) for index in self.upper}
        self.gates = {index: gate for index, gate in gates.items() if gate is not None}
        adapted = range(N) if self.shared else self.upper
        self.layers = [
            self._adapted(index) if index in adapted else backbone.layers[index]
            for index in range(N)
        ]
        self.joined: list[mx.array] = []
        self.apart: list[nn.Module] = []  # the upper layers for stream rows alone, if merged

    def tensor(self, name: str) -> mx.array:
        """Return a tensor by name.

        Raises:
            StreamsError: there is none.
        """
        if name not in self.tensors:
            raise StreamsError(f"the stream weights lack the tensor {name!r}.")
        return self.tensors[name]

    @property
    def arrays(self) -> list[mx.array]:
        """Return all weights as they are used, for evaluation."""
        adapters = [
            module
            for layer in self.layers
            for module in layer.modules()
            if isinstance(module, StreamLinear)
        ]
        own = [array for one in adapters for array in (one.lora_a, one.lora_b)]
        apart = [array for layer in self.apart for array in own_weights(layer)]
        by_source = self.conditioner.by_source.arrays if "conditioner" in vars(self) else []
        return [*self.tensors.values(), *own, *self.joined, *apart, *by_source]

    @cached_property
    def conditioner(self) -> Conditioner:
        """Return what re-ranks candidates; its weights are laid out once for all answers.

        Raises:
            StreamsError: there is none.
        """
        names = ("mlp_in", "mlp_out", "lora_a", "lora_b")
        return Conditioner(*(self.tensor(f"conditioner.{name}") for name in names))

    def prepare(self) -> None:
        """Get ready for decoding, where few kernels count: see `adapters.py`. Not for training.

        W + B·A is kept for passes of stream rows alone. Such a pass reads the layers' weights
        again in any case; main rows have their own layers, the base's.
        """
        self.joined = [array for layer in self.layers for array in join(layer)]
        if self.config.conditioner_rank:
            _ = self.conditioner  # evaluated with the others
        adapted = self.layers[self.first_msa :]
        whole = len(self.backbone.stages.own) == self.backbone.num_layers
        if self.shared or not whole or sum(map(merged_bytes, adapted)) > MERGED_BYTES:
            return
        found = [merged(layer) for layer in adapted]
        if all(layer is not None for layer in found):
            self.apart = [layer for layer in found if layer is not None]

    def _gate(self, index: int) -> mx.array | None:
        """Return layer `index`'s gates (H,), of this process's heads alone; None without."""
        gate = self.tensors.get(f"layers.{index}.stream_gate")
        parts = [m for m in self.backbone.layers[index].modules() if isinstance(m, OUT_OF_PARTS)]
        return gate if gate is None or not parts else part_of(gate, 0, parts[0].group)

    def _adapted(self, index: int) -> nn.Module:
        """Return layer `index` with LoRA joined to its target modules where tensors exist."""
        layer = view_layer(self.backbone.layers[index])
        split = None if self.shared else self.split
        for path in self.config.target_modules:
            name = f"layers.{index}.{path}"
            if f"{name}.lora_a" not in self.tensors and self.shared and index in self.lower:
                continue  # merged into the base on conversion
            *parents, leaf = path.split(".")
            owner: nn.Module | None = layer
            for parent in parents:
                owner = owner.get(parent) if isinstance(owner, nn.Module) else None
            if not isinstance(owner, nn.Module) or leaf not in owner:
                raise StreamsError(
                    f"the streams adapt {path!r}, which layer {index} of this model lacks."
                )
            b = self.tensor(f"{name}.lora_b")
            scaled = (b.astype(mx.float32) * self.config.lora_scale).astype(b.dtype)
            owner[leaf] = _joined(owner[leaf], self.tensor(f"{name}.lora_a"), scaled, split)
        return layer

    @property
    def num_streams(self) -> int:
        """Return γ."""
        return self.config.num_streams

    @property
    def know_next_token(self) -> bool:
        """Tell whether streams start from the token after theirs, and so must be deferred."""
        return self.next_token_map is not None

    def start(self, main: mx.array, following: mx.array | None = None) -> mx.array:
        """Return the streams' first hidden states S_tj = f(M_t) + P_j [SS Eq. 3].

        main: (B, n, h), main rows at the input of the first MSA layer. following: (B, n) int32,
        the tokens after them; needed by streams that know the next token, unused by others.
        Returns (B, n·γ, h), the streams of one node side by side.
        """
        if self.init_map is not None:
            a, b = self.init_map
            main = mx.addmm(main, main @ a, b)
        if self.next_token_map is not None:
            assert following is not None
            a, b = self.next_token_map
            rows = unit(self.backbone.embedding_rows(following.flatten()))
            main = mx.addmm(main, (rows @ a).reshape(*main.shape[:2], -1), b)
        B, n, h = main.shape
        return (main[:, :, None] + self.embeddings).reshape(B, n * self.num_streams, h)

    def positions(self, main: mx.array) -> mx.array:
        """Return the RoPE positions of the streams at main positions: t + j, or t.

        main: (n,) or (B, n) int32. Returns (n·γ,) or (B, n·γ).
        """
        beyond = self.config.rope_offset != "position"
        offsets = ints(tuple(j * beyond for j in range(1, self.num_streams + 1)))
        return (main[..., None] + offsets).flatten(-2)

    def forward(self, tokens: mx.array, cache: KVCache) -> mx.array:
        """Run consecutive tokens (R,) of the main stream, no streams; return (1, R, h).

        In shared mode the adapters act on these rows too. As `Backbone.forward`, it leaves
        `cache.advance` to the caller.
        """
        R, at = tokens.shape[0], cache.length
        every = range(self.backbone.num_layers)
        hidden = self.backbone.embed(tokens)
        return self.run(hidden, R, every, cache, at, at, causal_mask(at, R))

    def run(
        self,
        hidden: mx.array,
        num_main: int,
        layers: range,
        cache: PassCache,
        start: int,
        offset: int | mx.array,
        mask: RowMask,
    ) -> mx.array:
        """Run `layers` over rows (B, R, h), of which the first `num_main` are the main stream.

        The rows' keys and values go to the cache at `start`. Streams' values are rotated where
        the config says so [SS App. B.3, Eq. 9].
        """
        angles = self._value_angles(hidden.shape[1] - num_main, num_main)
        self.split.num_main = num_main
        stages = self.backbone.stages
        for part, owner in stages.split(layers):
            for index in part if owner == stages.rank else ():
                on_values = None if angles is None else lambda v: rotate_values(v, angles)
                row = cache.view(index, start, offset, on_values)
                allowed = self.backbone.mask(index, mask, row.span)
                gate = self.gates.get(index)
                if gate is not None and num_main < hidden.shape[1]:
                    if isinstance(row, QuantizedPass):
                        row.num_heads = gate.shape[0]
                    tail = 0 if row.span is None else row.span.tail
                    allowed = self._gated(allowed, gate, num_main, mask.own_streams, tail)
                own = self.apart and num_main == 0 and index >= self.first_msa
                layer = self.apart[index - self.first_msa] if own else self.layers[index]
                hidden = layer(hidden, allowed, row)
            hidden = stages.shared(hidden, owner)
        return hidden

    def _gated(
        self,
        allowed: Mask,
        gate: mx.array,
        num_main: int,
        to_streams: mx.array | None,
        tail: int = 0,
    ) -> mx.array:
        """Return the additive mask (B, H, R, S): who sees whom, plus `gate` (H,) main → streams.

        allowed: (R, S) or (B, 1, R, S) bool. to_streams: the same shape, where gates apply;
        None for main rows at the columns of the last `num_main`·γ keys, but for `tail` committed
        ones that stand behind them.
        """
        assert isinstance(allowed, mx.array)
        if allowed.ndim == 2:
            allowed = allowed[None, None]
        if to_streams is None:
            to_streams = mx.zeros(allowed.shape[-2:], dtype=mx.bool_)
            end = to_streams.shape[1] - tail
            to_streams[:num_main, end - num_main * self.num_streams : end] = True
        bias = mx.where(to_streams, gate[:, None, None], 0)
        return mx.where(allowed, bias, -mx.inf).astype(self.backbone.dtype)

    def _value_angles(self, num_stream_rows: int, num_main: int) -> mx.array | None:
        """Return each row's value rotation (R,) float32: ε·j for stream j, 0 for main rows."""
        if not self.config.value_rotation or not num_stream_rows:
            return None
        streams = mx.arange(1, self.num_streams + 1, dtype=mx.float32)
        streams = mx.tile(streams, num_stream_rows // self.num_streams)
        return self.config.value_rotation * mx.concatenate([mx.zeros((num_main,)), streams])


def _joined(
    base: nn.Module, a: mx.array, b: mx.array, split: RowSplit | None
) -> StreamLinear | Summed:
    """Return a linear layer with its adapter, also where processes hold a part of it each."""
    if isinstance(base, INTO_PARTS):
        return StreamLinear(base, a, part_of(b, 1, base.group), split)
    if isinstance(base, OUT_OF_PARTS):
        local = StreamLinear(LocalLinear(base), part_of(a, 0, base.group), b, split)
        return Summed(local, base)
    return StreamLinear(base, a, b, split)


def rotate_values(values: mx.array, angles: mx.array) -> mx.array:
    """Return values multiplied by e^{iθ}, neighbouring channels as complex numbers [SS Eq. 9].

    values: (1, K, R, D) with even D; angles: (R,) float32.
    """
    pairs = values.astype(mx.float32).reshape(*values.shape[:-1], -1, 2)
    cos, sin = mx.cos(angles)[:, None], mx.sin(angles)[:, None]
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = mx.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)
    return turned.reshape(values.shape).astype(values.dtype)


def pass_mask(
    ancestor_mask: mx.array,
    num_streams: int,
    length: int,
    main_sees_streams: bool,
    nodes: mx.array | None = None,
) -> mx.array:
    """Return who sees whom in an inline pass, (R, length + R) bool with R = T + n·γ.

    ancestor_mask: (T, T) bool. Rows and local columns are the T nodes, then the streams of n
    nodes, node by node; before them stand `length` committed columns that every row sees.
    nodes: (n,) int32, the nodes that have streams; None for all T.
    """
    T, G = ancestor_mask.shape[0], num_streams
    if G == 0:
        local = ancestor_mask
    else:
        itself = mx.eye(T, dtype=mx.bool_)
        above = ancestor_mask
        if nodes is not None:
            itself, above = mx.take(itself, nodes, axis=0), mx.take(above, nodes, axis=0)
        own = mx.repeat(itself.T, G, axis=1)
        among = among_streams(itself.shape[0], G)
        main = [ancestor_mask, own if main_sees_streams else mx.zeros_like(own)]
        streams = [mx.repeat(above, G, axis=0), among]
        local = mx.concatenate(
            [mx.concatenate(main, axis=1), mx.concatenate(streams, axis=1)], axis=0
        )
    prefix = mx.ones((local.shape[0], length), dtype=mx.bool_)
    return mx.concatenate([prefix, local], axis=1)
