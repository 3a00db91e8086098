"""What shared mode costs or gains in quality: plain next-token LoRA of the same budget beside it.

The same rank, modules, data, batches, learning rate and number of updates; no streams at all. Both
are judged by the main stream's cross-entropy per completion token of the held-out texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ..model.masks import causal_mask
from ..speculation.streams import Streams
from .base import base_states, embed_texts, kept_rows, pad_texts
from .batches import BatchPlan, Selection
from .head import Head, cross_entropy
from .initialise import untrained
from .loss import Tensors
from .optimizer import StreamOptimizer
from .shared import SharedObjective, main_rows
from .task import Task


def plain_states(streams: Streams, batch: Sequence[Selection]) -> mx.array:
    """Return final normed states (B, L, h) of the adapted model without streams."""
    tokens = pad_texts([s.example.tokens[:-1] for s in batch])
    every = range(streams.backbone.num_layers)
    hidden = embed_texts(streams.backbone, tokens)
    L = tokens.shape[1]
    cache = kept_rows(len(every))
    return streams.backbone.norm(streams.run(hidden, L, every, cache, 0, 0, causal_mask(0, L)))


def plain_lora_loss(task: Task, objective: SharedObjective) -> float:
    """Train plain LoRA on the task's data and return its held-out cross-entropy."""
    options, backbone = task.options, task.backbone
    config = replace(task.config, pruner_rank=0, conditioner_rank=0, conditioner_hidden=0)
    tensors = untrained(backbone, config, task.rms, options.seed)
    lora = {name: t for name, t in tensors.items() if name.endswith(("lora_a", "lora_b"))}
    rest = {name: t for name, t in tensors.items() if name not in lora}
    rate = options.learning_rate
    optimizer = StreamOptimizer(lora, {"embeddings": rate, "adapters": rate}, options)
    plan = BatchPlan(task.train, options.batch_size, options.position_fraction, options.seed)
    k = options.grad_accumulation_steps
    for update in tqdm(range(options.num_updates), desc="plain LoRA", disable=None):
        batches = [plan.batch(n) for n in range(update * k, min((update + 1) * k, options.iters))]
        count = sum(len(main_rows(batch)[0]) for batch in batches)
        sums: Tensors = {name: mx.zeros(t.shape) for name, t in lora.items()}
        for number, batch in enumerate(batches):
            text, at, target = main_rows(batch)
            weights = np.full(len(target), 1 / count, dtype=np.float32)
            head = objective.head(batch, update * k + number)

            def loss(lora: Tensors, batch=batch, text=text, at=at, target=target,  # type: ignore[no-untyped-def]
                     weights=weights, head=head):  # fmt: skip
                states = plain_states(Streams(backbone, config, rest | lora), batch)
                main = states[mx.array(text), mx.array(at)]
                return cross_entropy(main, head, target, weights)[0]

            gradients = mx.grad(loss)(lora)
            sums = {name: sums[name] + gradients[name] for name in sums}
            mx.eval(sums)
        lora, _, _ = optimizer.update(lora, sums, update)
    streams = Streams(backbone, config, rest | lora)
    return held_out_loss(task, lambda batch: plain_states(streams, batch))


def base_loss(task: Task) -> float:
    """Return the untouched model's held-out cross-entropy."""

    def states(batch: Sequence[Selection]) -> mx.array:
        tokens = pad_texts([s.example.tokens[:-1] for s in batch])
        return base_states(task.backbone, tokens, task.config.num_msa_layers).last

    return held_out_loss(task, states)


def held_out_loss(task: Task, states_of) -> float:  # type: ignore[no-untyped-def]
    """Return cross-entropy per completion token; `states_of` maps a batch to (B, L, h)."""
    total, count = 0.0, 0
    for example in task.valid:
        batch = [Selection(example, tuple(example.positions))]
        text, at, target = main_rows(batch)
        states = states_of(batch)[mx.array(text), mx.array(at)]
        ones = np.ones(len(target), dtype=np.float32)
        _, hard = cross_entropy(states, Head(task.backbone), target, ones)
        total, count = total + float(np.array(hard).sum()), count + len(target)
    return total / max(count, 1)
