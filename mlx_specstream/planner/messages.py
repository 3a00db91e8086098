"""What a message between processes costs here, and whether costs measured before still hold.

Steps are timed with their messages, so a cost curve holds for one network. The same machines on
another cable have another one, which nothing else would tell.
"""

from __future__ import annotations

import struct
import time

import mlx.core as mx

from ..machine import ranks
from ..model.backbone import Backbone
from .curve import CostCurve

SAMPLES = 12
CHANGE = (
    0.2  # of a plain token's time that messages may cost more or less before it is measured anew
)


def message_s(backbone: Backbone) -> float:
    """Return the seconds in which all processes sum one row of hidden states, 0 for one process.

    The shortest of several, by the leader's clock: a busy machine only makes them longer.
    """
    together = ranks.group()
    if together is None:
        return 0.0
    row = mx.zeros((1, 1, backbone.hidden_size), dtype=backbone.dtype)
    times = []
    for _ in range(SAMPLES):
        mx.eval(row)
        begun = time.perf_counter()
        mx.eval(mx.distributed.all_sum(row, group=together))
        times.append(time.perf_counter() - begun)
    (seconds,) = struct.unpack("d", ranks.told(struct.pack("d", min(times))))
    return float(seconds)


def messages_per_pass(backbone: Backbone) -> int:
    """Return how many messages a pass of one row waits for."""
    if backbone.stages.group is not None:
        return len(backbone.stages.ends)
    return 0 if ranks.group() is None else 2 * backbone.num_layers


def has_changed(curve: CostCurve, seconds: float, messages: int) -> bool:
    """Tell whether `messages` of so many seconds make a plain token cost something else."""
    return abs(seconds - curve.message_s) * messages > CHANGE * curve.plain.seconds
