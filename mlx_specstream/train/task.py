"""What a run is: model, shape, data, place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import StreamConfig
from ..model.backbone import Backbone
from .data import Example
from .loss import Tensors
from .options import TrainOptions


@dataclass(frozen=True)
class Task:
    """What to train, on what, and where the result goes.

    valid may be empty. stop: end-of-turn tokens. start: the weights to begin with. rms: of the
    hidden states the streams join. base_name: what the base model is called.
    """

    backbone: Backbone
    config: StreamConfig
    options: TrainOptions
    train: Sequence[Example]
    valid: Sequence[Example]
    folder: Path
    base_name: str | None
    stop: Collection[int]
    start: Tensors
    rms: float
    say: Callable[[str], None] = print

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """Return prompts to decode for a judgement: of held-out texts, if there are any."""
        return [example.prompt for example in self.valid or self.train]
