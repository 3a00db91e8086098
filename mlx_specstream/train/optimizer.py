"""AdamW over a flat table of stream weights, with a rate per group, a schedule and clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import mlx.core as mx
import mlx.optimizers as optim

from .loss import Tensors
from .options import TrainOptions
from .progress import rate_factor

GROUPS = ("embeddings", "adapters")


def group_of(name: str) -> str:
    """Return the learning-rate group of a tensor: stream embeddings have their own."""
    return "embeddings" if name == "stream_embeddings" else "adapters"


def schedule(options: TrainOptions, update: int, elapsed_s: float = 0.0) -> float:
    """Return the learning rate's factor for update `update` (from 0); the last one has `final_lr`."""
    done = min(1.0, update / max(1, options.num_updates - 1))
    if options.max_minutes:
        done = min(1.0, elapsed_s / (60 * options.max_minutes))
    shape = options.lr_schedule
    return rate_factor(update, done, warmup=options.warmup, final=options.final_lr, shape=shape)


class StreamOptimizer:
    """One AdamW per group; its state is a flat table too."""

    def __init__(self, tensors: Tensors, rates: Mapping[str, float], options: TrainOptions) -> None:
        self.options, self.rates = options, dict(rates)
        self.groups = {
            group: {name: t for name, t in tensors.items() if group_of(name) == group}
            for group in GROUPS
        }
        self.optimizers: dict[str, optim.AdamW] = {}
        for group, members in self.groups.items():
            optimizer = optim.AdamW(
                self.rates[group],
                betas=[0.9, options.beta2],
                weight_decay=options.weight_decay,
                bias_correction=True,
            )
            optimizer.init(members)
            self.optimizers[group] = optimizer

    def update(
        self, tensors: Tensors, gradients: Tensors, update: int, elapsed_s: float = 0.0
    ) -> tuple[Tensors, float, bool]:
        """Return the new weights, the gradient's norm before clipping, and whether it is finite.

        With a gradient that is not finite nothing changes.
        """
        # The same order and layout of memory whether the weights come from here or from a file:
        # sums and products round by it, and a resumed run would drift off by bits.
        gradients = {name: mx.contiguous(g) for name, g in sorted(gradients.items())}
        if self.options.clip:
            gradients, norm = optim.clip_grad_norm(gradients, self.options.clip)
        else:
            norm = mx.sqrt(sum((g.square().sum() for g in gradients.values()), mx.array(0.0)))
        size = cast(float, norm.item())
        if not math.isfinite(size):
            return tensors, size, False
        factor = schedule(self.options, update, elapsed_s)
        changed = dict(tensors)
        for group, optimizer in self.optimizers.items():
            names = [name for name in self.groups[group] if name in gradients]
            optimizer.learning_rate = self.rates[group] * factor
            changed |= optimizer.apply_gradients(
                {name: gradients[name] for name in names}, {name: tensors[name] for name in names}
            )
        mx.eval(changed, [optimizer.state for optimizer in self.optimizers.values()])
        return changed, size, True

    @property
    def arrays(self) -> Tensors:
        """Return the optimizer's state: `group/step`, `group/name/m`, `group/name/v`."""
        state: Tensors = {}
        for group, optimizer in self.optimizers.items():
            state[f"{group}/step"] = optimizer.state["step"].astype(mx.uint32)
            for name in self.groups[group]:
                for moment, value in optimizer.state[name].items():
                    state[f"{group}/{name}/{moment}"] = value
        return state

    def restore(self, arrays: Mapping[str, mx.array]) -> None:
        """Take over a state that `arrays` gave."""
        for group, optimizer in self.optimizers.items():
            optimizer.state["step"] = arrays[f"{group}/step"].astype(mx.uint64)
            for name in self.groups[group]:
                own = optimizer.state[name]
                optimizer.state[name] = {m: arrays[f"{group}/{name}/{m}"] for m in own}
