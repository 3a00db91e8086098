"""Main rows and streams of many texts together, what their prompts share computed once: shared mode's fast forward.

In shared mode main depends on the adapters and on its streams, so every row has a gradient. Prompts of a task often
begin alike (a schema, an instruction); with one adapter for all rows that beginning is the same for all of them, and
its gradient is the sum. Rows stand in one matrix (R, h) for the large products; attention looks at one text at a time:

    rows:  prefix │ own rows of text a │ own rows of text b │ .. next family .. ║ streams of a │ streams of b │ ..

                     prefix   own            streams
    own row t          1      0..t           its own γ, if t gets streams (the last prompt token and the answer)
    stream (t, j)      1      0..t           1..j of t
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import DataError
from ...train.batches import alike
from ...train.data import Example
from .adapters import StreamAdapters
from .backbone import TorchBackbone, attend
from .masks import stream_mask
from .merged import MergedLayers
from .model import rotate_values


@dataclass(frozen=True)
class Branch:
    """One text's own rows: `own` tokens after its family's `prefix`; streams from own row `first` on."""

    number: int
    own: tuple[int, ...]
    prefix: int
    first: int

    @property
    def num_streamed(self) -> int:
        """Rows that get streams: the last prompt token and every answer token that is fed."""
        return len(self.own) - self.first


@dataclass(frozen=True)
class Family:
    """Texts whose prompts begin with the tokens `prefix`."""

    prefix: tuple[int, ...]
    branches: tuple[Branch, ...]


def families(texts: Sequence[Example]) -> list[Family]:
    """Group texts by what their prompts share; the last prompt token is never shared, it gets streams."""
    found = []
    for group in alike(list(enumerate(texts)), lambda pair: pair[1].prompt):
        prompts = [text.prompt for _, text in group]
        low, high = min(prompts), max(prompts)
        same = next(
            (i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low)
        )
        size = min(same, *(len(p) - 1 for p in prompts))
        branches = tuple(
            Branch(
                number,
                (*text.prompt[size:], *text.answer[:-1]),
                size,
                len(text.prompt) - 1 - size,
            )
            for number, text in group
        )
        found.append(Family(prompts[0][:size], branches))
    return found


@dataclass(frozen=True)
class JointOutput:
    """Normed rows of the positions that predict the answers, texts in the order given.

    main: (ΣA, h). streams: (ΣA, γ, h), or None where there are none.
    """

    main: Tensor
    streams: Tensor | None


class JointStreams:
    """Main and streams of one model, batched; compute dtype is the backbone's, adapters stay float32."""

    def __init__(
        self, backbone: TorchBackbone, adapters: StreamAdapters, streams: bool = True
    ) -> None:
        """`streams=False` leaves the streams out: a plain LoRA model."""
        self.backbone, self.adapters, self.with_streams = backbone, adapters, streams
        self.rows = MergedLayers(backbone, adapters)

    def forward(self, texts: Sequence[Example], opening: float = 0.0) -> JointOutput:
        """Run whole texts.

        Args:
            opening: added to the scores that main rows give their streams; far below zero they are closed.
        """
        groups = families(texts)
        branches = [branch for family in groups for branch in family.branches]
        self._check_window(branches)
        ids = [t for f in groups for t in (*f.prefix, *(t for b in f.branches for t in b.own))]
        at = [
            p
            for f in groups
            for p in (*range(len(f.prefix)), *(b.prefix + i for b in f.branches for i in range(len(b.own))))
        ]  # fmt: skip
        sizes = [n for f in groups for n in (len(f.prefix), *(len(b.own) for b in f.branches))]
        positions = torch.tensor(at)
        x = self.backbone.embed(torch.tensor([ids]))[0]
        rotation = self.rows.rotation(positions)
        masks = [self._mask(branch, 0, 0.0) for branch in branches]
        split = self.adapters.first_msa_layer if self.with_streams else len(self.backbone.layers)
        for index in range(split):
            x = self._layer(index, x, rotation, groups, sizes, masks, 0)
        num_main, G = len(x), self.adapters.config.num_streams if self.with_streams else 0
        if G:
            ends, offset = [], 0
            for size in sizes:
                offset += size
                ends.append(offset)
            own_ends = self._own_ends(groups, ends)
            ranges = zip(own_ends, branches, strict=True)
            rows = torch.cat([torch.arange(end - b.num_streamed, end) for end, b in ranges])
            x = torch.cat((x, self.adapters.start(x[rows]).flatten(0, 1)))
            positions = torch.cat((positions, self.adapters.positions(positions[rows]).flatten()))
            rotation = self.rows.rotation(positions)
            masks = [self._mask(branch, G, opening) for branch in branches]
            sizes = [*sizes, *(b.num_streamed * G for b in branches)]
            for index in range(split, len(self.backbone.layers)):
                x = self._layer(index, x, rotation, groups, sizes, masks, G)
        return self._output(self.rows.final_norm(x), num_main, groups, sizes, G)

    @staticmethod
    def _own_ends(groups: Sequence[Family], ends: Sequence[int]) -> list[int]:
        """Return where each branch's own rows end, of the ends of all pieces (prefix, own, own, prefix ..)."""
        piece = 0
        found: list[int] = []
        for family in groups:
            found += ends[piece + 1 : piece + 1 + len(family.branches)]
            piece += 1 + len(family.branches)
        return found

    def _mask(self, branch: Branch, num_streams: int, opening: float) -> Tensor:
        """Return the additive mask of a branch's rows (own, streams) over its keys (prefix, own, streams)."""
        n, m, G = len(branch.own), branch.num_streamed, num_streams
        own, streamed = torch.ones(1, n, n, dtype=torch.bool).tril(), branch.first + torch.arange(m)
        seen = stream_mask(own, streamed, G, main_sees_streams=True)[0]
        seen = torch.cat((torch.ones(len(seen), branch.prefix, dtype=torch.bool), seen), 1)
        mask = torch.zeros(seen.shape, dtype=self.backbone.dtype).masked_fill_(~seen, -torch.inf)
        if G and opening:
            mask[:n, branch.prefix + n :] += opening
        return mask

    def _layer(
        self,
        index: int,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        groups: Sequence[Family],
        sizes: Sequence[int],
        masks: Sequence[Tensor],
        num_streams: int,
    ) -> Tensor:
        q, k, v = self.rows.queries_keys_values(index, x, rotation)
        scale, G = self.backbone.layers[index].scale, num_streams
        if G and self.adapters.config.value_rotation:
            num_main = sum(len(f.prefix) + sum(len(b.own) for b in f.branches) for f in groups)
            levels = torch.arange(1, G + 1).repeat((len(x) - num_main) // G)
            turned = rotate_values(
                v[num_main:].transpose(0, 1)[None], self.adapters.config.value_rotation * levels
            )
            v = torch.cat((v[:num_main], turned[0].transpose(0, 1)))
        # One split: its gradient is one concatenation, where slices would each fill a whole matrix.
        q, k, v = (list(t.transpose(0, 1).split(list(sizes), dim=1)) for t in (q, k, v))
        streams_at = sum(1 + len(family.branches) for family in groups)
        main_out, stream_out, piece, number = [], [], 0, 0
        for family in groups:
            prefix = piece
            if family.prefix:
                size = len(family.prefix)
                causal = torch.ones(size, size, dtype=torch.bool).tril()
                head = (q[prefix][None], k[prefix][None], v[prefix][None])
                main_out.append(attend(*head, causal, scale)[0])
            for branch in family.branches:
                piece += 1
                own = [piece, streams_at + number] if G else [piece]
                queries = torch.cat([q[i] for i in own], 1)
                keys, values = (torch.cat([t[i] for i in (prefix, *own)], 1) for t in (k, v))
                out = attend(queries[None], keys[None], values[None], masks[number], scale)[0]
                main_out.append(out[: len(branch.own)])
                stream_out.append(out[len(branch.own) :])
                number += 1
            piece += 1
        return self.rows.finish(index, x, torch.cat((*main_out, *stream_out)))

    def _output(
        self, x: Tensor, num_main: int, groups: Sequence[Family], sizes: Sequence[int], G: int
    ) -> JointOutput:
        pieces = x[:num_main].split(list(sizes[: sum(1 + len(f.branches) for f in groups)]))
        main: dict[int, Tensor] = {}
        piece = 0
        for family in groups:
            for branch in family.branches:
                piece += 1
                main[branch.number] = pieces[piece][branch.first :]
            piece += 1
        order = sorted(main)
        streams = None
        if G:
            numbers = [branch.number for family in groups for branch in family.branches]
            parts = x[num_main:].split([len(main[n]) * G for n in numbers])
            by_number = dict(zip(numbers, parts, strict=True))
            streams = torch.cat([by_number[n] for n in order]).unflatten(0, (-1, G))
        return JointOutput(torch.cat([main[n] for n in order]), streams)

    def _check_window(self, branches: Sequence[Branch]) -> None:
        longest = max(b.prefix + len(b.own) for b in branches) + self.adapters.config.num_streams
        for index in range(len(self.backbone.layers)):
            window = self.backbone.window(index)
            if window is not None and longest > window:
                raise DataError(
                    f"a text of {longest} tokens, streams included, is longer than the model's window of "
                    f"{window}; cut it shorter."
                )
