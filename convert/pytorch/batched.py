"""Greedy decoding of many prompts at once: continuous batching over preallocated key/value buffers.

A slot is one sequence; a finished slot is refilled with the next prompt, so that every matrix product keeps nearly
`batch_size` rows:

    slot 0  [prompt a | answer a ....]
    slot 1  [prompt b | ans b][eos]          -> [prompt e | answer e ..]
    slot 2  [prompt c       | answer c ..]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from ...train.distilled import PromptToAnswer, in_order
from .backbone import TorchBackbone
from .states import States

SORT_WINDOW = 2048
"""Prompts are sorted by length inside windows of this size: neighbours pad little."""


@dataclass
class PromptInSlot(PromptToAnswer):
    """A prompt waiting for, or receiving, its answer; with the base's states for it, if they are kept."""

    answer: list[int] = field(default_factory=list)
    states: States | None = None


def greedy(backbone: TorchBackbone, hidden: Tensor) -> Tensor:
    """Return the best token of each row of `hidden` (B, h), normed.

    A 16-bit product cannot tell close logits apart, so every candidate within its error of the best is computed again
    in float32.
    """
    logits = backbone.head(hidden)
    if logits.dtype == torch.float32:
        return logits.argmax(-1)
    best = logits.amax(-1, keepdim=True)
    rows, tokens = (logits >= best - best.abs() * 2**-6).nonzero(as_tuple=True)
    exact = (hidden[rows].float() * backbone.head_weight[tokens].float()).sum(-1)
    top = torch.full((hidden.shape[0],), -torch.inf).scatter_reduce(0, rows, exact, "amax")
    winners = exact == top[rows]
    return torch.zeros(hidden.shape[0], dtype=torch.long).scatter(0, rows[winners], tokens[winners])


class SlotDecoder:
    """Greedy decoding of many sequences in slots; keeps base states of the top `num_msa_layers` layers if asked to."""

    def __init__(
        self,
        backbone: TorchBackbone,
        batch_size: int,
        max_length: int,
        max_new_tokens: int,
        eos: set[int],
        num_msa_layers: int = 0,
    ) -> None:
        self.backbone, self.max_new_tokens, self.eos = backbone, max_new_tokens, eos
        self.first_msa_layer = len(backbone.layers) - num_msa_layers
        self.hidden = torch.zeros(
            batch_size, max_new_tokens if num_msa_layers else 0, backbone.hidden_size
        ).to(backbone.dtype)
        shape = (batch_size, backbone.num_kv_heads, max_length, backbone.head_dim)
        self.keys = [torch.zeros(shape, dtype=backbone.dtype) for _ in backbone.layers]
        self.values = [torch.zeros(shape, dtype=backbone.dtype) for _ in backbone.layers]
        self.prompts: list[PromptInSlot | None] = [None] * batch_size
        self.lengths = torch.zeros(batch_size, dtype=torch.long)
        self.last = torch.zeros(batch_size, dtype=torch.long)
        self.rotations = backbone.rotation(torch.arange(max_length)[None])

    @property
    def free(self) -> list[int]:
        return [slot for slot, prompt in enumerate(self.prompts) if prompt is None]

    def fill(self, slots: list[int], prompts: list[PromptInSlot]) -> list[PromptInSlot]:
        """Prefill `prompts` into `slots`; return those that are finished after one token."""
        lengths = [len(p.tokens) for p in prompts]
        x = self._prefill(slots, [p.tokens for p in prompts])
        last = torch.tensor(lengths) - 1
        tokens = greedy(self.backbone, self.backbone.norm(x[torch.arange(len(slots)), last]))
        self._occupy(slots, prompts, lengths)
        return self._take(slots, tokens)

    def _occupy(self, slots: list[int], prompts: list[PromptInSlot], lengths: list[int]) -> None:
        self.lengths[slots] = torch.tensor(lengths)
        for slot, prompt in zip(slots, prompts, strict=True):
            self.prompts[slot] = prompt

    def _prefill(self, slots: list[int], texts: list[list[int]]) -> Tensor:
        """Run `texts` in `slots`, keeping keys and values; return the last layer's rows (B, width, h)."""
        width = max(len(ids) for ids in texts)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in texts])
        lengths = torch.tensor([len(ids) for ids in texts])
        rows = torch.tensor(slots)
        rotation = tuple(table[:, :width] for table in self.rotations)
        x = self.backbone.embed(ids)
        for i, (layer, keys, values) in enumerate(
            zip(self.backbone.layers, self.keys, self.values, strict=True)
        ):
            if i == self.first_msa_layer:
                self.hidden[rows, 0] = x[torch.arange(len(slots)), lengths - 1]
            q, k, v = layer.queries_keys_values(x, rotation)
            keys[rows, :, :width], values[rows, :, :width] = k, v
            groups = layer.num_heads // layer.num_kv_heads
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            out = functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=layer.scale
            )
            x = layer.finish(x, out.transpose(1, 2).flatten(2))
        return x

    def step(self) -> list[PromptInSlot]:
        """Decode one token in every slot; return the prompts that are finished."""
        slots = [slot for slot, prompt in enumerate(self.prompts) if prompt is not None]
        B, rows = len(self.prompts), torch.arange(len(self.prompts))
        positions = self.lengths
        S = int(positions[slots].max()) + 1
        rotation = tuple(table[0, positions][:, None] for table in self.rotations)
        mask = (torch.arange(S) <= positions[:, None])[:, None, None]
        x = self.backbone.embed(self.last[:, None])
        answered = torch.tensor([len(p.answer) if p is not None else 0 for p in self.prompts])
        for i, (layer, keys, values) in enumerate(
            zip(self.backbone.layers, self.keys, self.values, strict=True)
        ):
            if i == self.first_msa_layer:
                self.hidden[rows, answered] = x[:, 0]
            q, k, v = layer.queries_keys_values(x, rotation)
            keys[rows, :, positions], values[rows, :, positions] = k[:, :, 0], v[:, :, 0]
            # One query row per head: the heads of a group stand in for rows, so that keys are read once.
            q = q.view(B, layer.num_kv_heads, -1, layer.head_dim)
            out = functional.scaled_dot_product_attention(
                q, keys[:, :, :S], values[:, :, :S], attn_mask=mask, scale=layer.scale
            )
            x = layer.finish(x, out.reshape(B, 1, -1))
        tokens = greedy(self.backbone, self.backbone.norm(x[:, 0]))
        self.lengths[slots] += 1
        return self._take(slots, tokens[slots])

    def compact(self, batch_size: int) -> None:
        """Keep the occupied slots and enough free ones for `batch_size` in all."""
        occupied = [slot for slot, prompt in enumerate(self.prompts) if prompt is not None]
        keep = (occupied + self.free)[:batch_size]
        for buffers in (self.keys, self.values):
            for i, buffer in enumerate(buffers):
                buffers[i] = buffer[keep]
        self.prompts = [self.prompts[slot] for slot in keep]
        self.lengths, self.last, self.hidden = (
            self.lengths[keep],
            self.last[keep],
            self.hidden[keep],
        )

    def _states(self, slot: int, length: int, answer: int) -> States:
        top = slice(self.first_msa_layer, None)
        keys, values = (
            torch.stack([b[slot, :, :length] for b in bufs[top]])
            for bufs in (self.keys, self.values)
        )
        return States(keys, values, self.hidden[slot, :answer].clone())

    def _take(self, slots: list[int], tokens: Tensor) -> list[PromptInSlot]:
        finished = []
        for slot, token in zip(slots, tokens.tolist(), strict=True):
            prompt = self.prompts[slot]
            assert prompt is not None
            prompt.answer.append(token)
            self.last[slot] = token
            if token in self.eos or len(prompt.answer) >= self.max_new_tokens:
                finished.append(prompt)
                if self.hidden.shape[1]:
                    prompt.states = self._states(slot, int(self.lengths[slot]), len(prompt.answer))
                self.prompts[slot], self.lengths[slot] = None, 0
        return finished


def answer(
    backbone: TorchBackbone,
    prompts: list[PromptInSlot],
    *,
    batch_size: int,
    max_new_tokens: int,
    eos: set[int],
    num_msa_layers: int = 0,
    make: Callable[..., SlotDecoder] = SlotDecoder,
) -> Iterator[PromptInSlot]:
    """Yield each prompt once its greedy answer is complete, in order of completion.

    make: makes the decoder, with `SlotDecoder`'s arguments.
    """
    if not prompts:
        return
    queue = list(in_order(prompts, SORT_WINDOW))
    queue.reverse()
    batch_size = min(batch_size, len(queue))
    longest = max(len(p.tokens) for p in queue) + max_new_tokens
    decoder = make(backbone, batch_size, longest, max_new_tokens, eos, num_msa_layers)
    refill = max(1, batch_size // 16)
    with torch.inference_mode():
        while True:
            free = decoder.free
            while queue and len(free) >= min(refill, len(queue)):
                slots, free = free[:refill], free[refill:]
                batch = [queue.pop() for _ in range(min(len(slots), len(queue)))]
                yield from decoder.fill(slots[: len(batch)], batch)
                free += [s for s in slots if decoder.prompts[s] is None]
            live = len(decoder.prompts) - len(decoder.free)
            if live == 0 and not queue:
                return
            if not queue and live <= 0.75 * len(decoder.prompts):
                decoder.compact(live)
            if live:
                yield from decoder.step()
