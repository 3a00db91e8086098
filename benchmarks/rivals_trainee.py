"""What is trained among rivals: each method at each of its learning rates, with its own optimiser."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from benchmarks.rivals_draft_model import DraftModelObjective, spread
from mlx_specstream.errors import OptionError
from mlx_specstream.loading.load import StreamModel
from mlx_specstream.train.batches import Selection
from mlx_specstream.train.drafter_loss import BaseText, DrafterObjective
from mlx_specstream.train.drafters import DRAFTERS, drafter_config, untrained
from mlx_specstream.train.head import Head
from mlx_specstream.train.loss import Tensors
from mlx_specstream.train.optimizer import GROUPS, StreamOptimizer
from mlx_specstream.train.options import TrainOptions
from mlx_specstream.train.trainer import DivergenceError

DRAFT_MODEL = "draft-model"
METHODS = ("medusa", "hydra", "eagle", "eagle3", DRAFT_MODEL)


class Objective(Protocol):
    """What gives the loss of a batch for some weights."""

    def loss(
        self, tensors: Tensors, batch: Sequence[Selection], bases: Sequence[BaseText], head: Head
    ) -> tuple[mx.array, list[mx.array]]:
        """Return what is minimised, (), and cross-entropies by level."""


@dataclass
class Trainee:
    """One method at one learning rate. seconds: spent on its own updates."""

    kind: str
    rate: float
    objective: Objective
    tensors: Tensors
    optimizer: StreamOptimizer
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.kind} {self.rate:g}"

    def update(
        self, batch: Sequence[Selection], bases: Sequence[BaseText], head: Head, number: int
    ) -> float:
        """Make one update; return its loss.

        Raises:
            DivergenceError: the loss is not a number.
        """
        started = time.perf_counter()

        def loss(tensors: Tensors) -> tuple[mx.array, list[mx.array]]:
            return self.objective.loss(tensors, batch, bases, head)

        (total, _), gradients = mx.value_and_grad(loss)(self.tensors)
        found = float(np.array(total))
        self.tensors, _, finite = self.optimizer.update(self.tensors, gradients, number)
        if not finite or not np.isfinite(found):
            raise DivergenceError(f"the loss of {self.name} became NaN in update {number + 1}.")
        self.seconds += time.perf_counter() - started
        return found


def trainees(
    model: StreamModel,
    methods: Sequence[str],
    rates: Sequence[float],
    keep: int,
    options: TrainOptions,
) -> list[Trainee]:
    """Return every method at every learning rate, untrained.

    methods: names, each with rates of its own if it has any: `eagle3=1e-3,3e-3`. keep: layers of a
    draft model.

    Raises:
        OptionError: a method is not known, or a rate is no number above 0.
    """
    found = []
    for word in methods:
        kind, equals, own = word.partition("=")
        if kind not in (*DRAFTERS, DRAFT_MODEL):
            known = ", ".join((*DRAFTERS, DRAFT_MODEL))
            raise OptionError(f"the method {kind!r} is not known; there are {known}.")
        for rate in _rates(own) if equals else rates:
            objective: Objective
            if kind == DRAFT_MODEL:
                layers = spread(model.backbone.num_layers, keep)
                objective = skipped = DraftModelObjective(model.backbone, layers)
                tensors = skipped.start
            else:
                config = drafter_config(kind, model.backbone, options.num_streams)
                objective = DrafterObjective(model.backbone, config, options.alpha_decay)
                tensors = untrained(config, model.backbone, options.seed)
            optimizer = StreamOptimizer(tensors, dict.fromkeys(GROUPS, rate), options)
            found.append(Trainee(kind, rate, objective, tensors, optimizer))
    return found


def _rates(text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise OptionError(f"cannot read the learning rates {text!r}; write like eagle3=1e-3,3e-3.")
    return found
