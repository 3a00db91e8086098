"""Greedy decoding of a shared-mode model, many prompts at once: main attends to its own streams at every token.

What it computes is what speculative decoding of that model emits, a token at a time; it is there to measure the model's
quality. LoRA serves every row, so it is merged into the weights for good.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .adapters import StreamAdapters
from .backbone import DecoderLayer, Rotation, TorchBackbone, attend
from .batched import PromptInSlot, SlotDecoder, greedy
from .model import rotate_values


def merge_lora(backbone: TorchBackbone, adapters: StreamAdapters) -> None:
    """Add s·B·A to the backbone's own weights, in place."""
    with torch.no_grad():
        for index, layer in enumerate(backbone.layers):
            for name, module in layer.linear_modules().items():
                delta = adapters.delta(index, name)
                if delta is not None:
                    change = delta.scale * (delta.lora_B.weight @ delta.lora_A.weight)
                    module.weight.add_(change.to(module.weight.dtype))


class SharedDecoder(SlotDecoder):
    """A `SlotDecoder` whose rows carry streams from the last prompt token on; `backbone` holds the merged weights."""

    def __init__(
        self,
        backbone: TorchBackbone,
        batch_size: int,
        max_length: int,
        max_new_tokens: int,
        eos: set[int],
        num_msa_layers: int = 0,
        *,
        adapters: StreamAdapters,
    ) -> None:
        if num_msa_layers:
            raise ValueError("a shared-mode model has no states of a frozen base to keep")
        super().__init__(backbone, batch_size, max_length, max_new_tokens, eos)
        self.adapters = adapters
        positions = torch.arange(max_length + adapters.config.num_streams)[None]
        self.rotations = backbone.rotation(positions)

    def fill(self, slots: list[int], prompts: list[PromptInSlot]) -> list[PromptInSlot]:
        """Prefill all but the last prompt token, which has streams and so takes the next step."""
        self._prefill(slots, [p.tokens[:-1] for p in prompts])
        self._occupy(slots, prompts, [len(p.tokens) - 1 for p in prompts])
        for slot, prompt in zip(slots, prompts, strict=True):
            self.last[slot] = prompt.tokens[-1]
        return []

    def step(self) -> list[PromptInSlot]:
        """Decode one token in every slot; return the prompts that are finished."""
        slots = [slot for slot, prompt in enumerate(self.prompts) if prompt is not None]
        S = int(self.lengths[slots].max()) + 1
        cached = torch.arange(S) <= self.lengths[:, None]
        x, at = self.backbone.embed(self.last[:, None]), self.lengths[:, None]
        rotation = self._rotation(at)
        for index, layer in enumerate(self.backbone.layers):
            if index == self.adapters.first_msa_layer:
                x = torch.cat((x, self.adapters.start(x)[:, 0]), dim=1)
                rotation = self._rotation(
                    torch.cat((at, self.adapters.positions(at).flatten(1)), dim=1)
                )
            x = self._layer(layer, self.keys[index], self.values[index], x, rotation, cached)
        tokens = greedy(self.backbone, self.backbone.norm(x[:, 0]))
        self.lengths[slots] += 1
        return self._take(slots, tokens[slots])

    def _rotation(self, positions: Tensor) -> Rotation:
        cos, sin = (table[0, positions] for table in self.rotations)
        return cos, sin

    def _layer(
        self,
        layer: DecoderLayer,
        keys: Tensor,
        values: Tensor,
        x: Tensor,
        rotation: Rotation,
        cached: Tensor,
    ) -> Tensor:
        """Run main (B, 1, h), or main and streams (B, 1 + γ, h); cached: (B, S), which cache rows are seen."""
        (B, rows, _), S = x.shape, cached.shape[1]
        q, k, v = layer.queries_keys_values(x, rotation)
        if rows > 1 and self.adapters.config.value_rotation:
            angles = self.adapters.config.value_rotation * torch.arange(1, rows)
            v = torch.cat((v[:, :, :1], rotate_values(v[:, :, 1:], angles)), dim=2)
        every = torch.arange(B)
        keys[every, :, self.lengths], values[every, :, self.lengths] = k[:, :, 0], v[:, :, 0]
        among = torch.ones(rows, rows - 1, dtype=torch.bool).tril(-1)
        among[:1] = True
        mask = torch.cat(
            (cached[:, None].expand(B, rows, S), among.expand(B, rows, rows - 1)), dim=2
        )
        k = torch.cat((keys[:, :, :S], k[:, :, 1:]), dim=2)
        v = torch.cat((values[:, :, :S], v[:, :, 1:]), dim=2)
        return layer.finish(x, attend(q, k, v, mask[:, None], layer.scale))
