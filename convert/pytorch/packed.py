"""Stream rows of many texts in one batch: the fast forward of lossless training.

Main rows never depend on the streams, so only stream rows are computed here; the main stream's keys and values and the
hidden states where the streams start are given (`states.py`). Rows of all texts stand in one matrix (N·γ, h) without
padding, so that the large products see no waste; only attention looks at one text at a time:

    text a [n_a positions x γ rows]   keys: main 0..t of a, own streams 1..j
    text b [n_b positions x γ rows]   keys: main 0..t of b, own streams 1..j
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import DataError
from .adapters import StreamAdapters
from .backbone import TorchBackbone
from .merged import MergedLayers
from .model import rotate_values
from .states import States
from .stream_attention import StreamAttention, Text


@dataclass(frozen=True)
class PackedBatch:
    """Stream positions of several texts.

    states: base states of each text. rows: (n_b,) int64 per text, which `states.hidden` rows get streams.
    first: position of `states.hidden[0]` in each text, i.e. prompt length - 1.
    following: (N,) int64, the token x_{t+1} of every position; streams that do not know it need none.
    """

    states: Sequence[States]
    rows: Sequence[Tensor]
    first: Sequence[int]
    following: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """Return t of every stream position, (N,)."""
        return torch.cat([rows + first for rows, first in zip(self.rows, self.first, strict=True)])


class PackedStreams:
    """Stream rows of one model, batched; compute dtype is the backbone's, adapters stay float32."""

    def __init__(self, backbone: TorchBackbone, adapters: StreamAdapters) -> None:
        self.backbone, self.adapters = backbone, adapters
        self.rows = MergedLayers(backbone, adapters)
        self.layers = range(adapters.first_msa_layer, len(backbone.layers))

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return the streams' final normed hidden states, (N, γ, h)."""
        adapters, G = self.adapters, self.adapters.config.num_streams
        main = torch.cat([s.hidden[rows] for s, rows in zip(batch.states, batch.rows, strict=True)])
        known = None if batch.following is None else self.backbone.embed(batch.following)
        x = adapters.start(main.to(self.backbone.dtype), known).flatten(0, 1)
        rotation = self.rows.rotation(adapters.positions(batch.positions))
        for number, index in enumerate(self.layers):
            q, k, v = self.rows.queries_keys_values(index, x, rotation)
            if adapters.config.value_rotation:
                levels = torch.arange(1, G + 1).repeat(len(x) // G)
                angles = adapters.config.value_rotation * levels
                v = rotate_values(v.transpose(0, 1)[None], angles)[0].transpose(0, 1)
            texts, scale = self._texts(batch, number, index), self.backbone.layers[index].scale
            attended = StreamAttention.apply(q, k, v, texts, G, scale)
            x = self.rows.finish(index, x, attended.flatten(1))
        return self.rows.final_norm(x).view(-1, G, x.shape[-1])

    def _texts(self, batch: PackedBatch, number: int, index: int) -> list[Text]:
        texts, start, window = [], 0, self.backbone.window(index)
        for states, rows, first in zip(batch.states, batch.rows, batch.first, strict=True):
            t = (rows + first)[:, None]
            S = int(t[-1, 0]) + 1
            s = torch.arange(S)
            hidden = s > t
            if window is not None and S + self.adapters.config.num_streams > window:
                raise DataError(
                    f"a text of {S} tokens is longer than the model's window of {window}; cut it shorter."
                )
            texts.append(
                Text(
                    start,
                    start + len(rows),
                    states.keys[number, :, :S],
                    states.values[number, :, :S],
                    hidden,
                )
            )
            start += len(rows)
        return texts
