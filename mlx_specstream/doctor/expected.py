"""What speculation should gain with a model that is not here yet: a prediction, labelled as one.

Costs come from published figures of the chip (`planner/prior.py`), acceptance from the records of the
shipped streams; both are another model's, so this tells whether trying is worth while, no more.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..machine import Machine
from ..planner.acceptance import profile_of
from ..planner.prior import ModelSize, chip_of
from ..weights.shipped import SHIPPED, shipped_names
from .chips import predict
from .sizes import Shape

LABEL = (
    "Predicted from published figures of the chip and from what the demo model's streams had "
    "accepted, not measured; with streams as good as those, for short contexts."
)


@dataclass(frozen=True)
class Expectation:
    """One model in one precision: plain tokens per second, and by task the tree and speed-up."""

    model: str
    bits: int
    plain_tokens_s: float
    by_task: dict[str, tuple[str, float]]

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        return {**asdict(self), "label": LABEL}


def expected(machine: Machine, shape: Shape, bits: int) -> Expectation | None:
    """Return what is to be expected; None if there are no published figures for the chip."""
    chip = chip_of(machine)
    if chip is None or machine.backend != "metal":
        return None
    head = float(shape.vocab * shape.hidden)
    size = ModelSize(
        shape.name,
        shape.layers,
        shape.num_params - head * (1 if shape.tied else 2),
        head,
        max(1, shape.layers // 4),
    )
    by_task: dict[str, tuple[str, float]] = {}
    plain = 0.0
    for name in shipped_names():
        profile = profile_of(SHIPPED / name)
        if profile is None:
            continue
        for one in predict(chip, bits, size, profile):
            if one.task not in by_task or one.speedup > by_task[one.task][1]:
                by_task[one.task] = (one.plan, one.speedup)
            plain = one.plain_tokens_per_s
    return Expectation(shape.name, bits, plain, by_task) if by_task else None
