"""What a run will take, said before it starts: memory by arithmetic, memory and time by a trial."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config import StreamConfig
from ..errors import OptionError
from ..model.backbone import Backbone
from ..weights.fingerprint import base_dims
from .batches import Selection
from .head import CHUNK
from .loss import Tensors
from .options import TrainOptions
from .progress import Estimate

ADAM_COPIES = 4  # weights, gradient, two moments


def memory_bytes(
    backbone: Backbone,
    config: StreamConfig,
    tensors: Tensors,
    options: TrainOptions,
    longest: Sequence[Selection],
) -> int:
    """Return roughly how many bytes the largest batch needs, before anything is computed."""
    item, h, V = backbone.dtype.size, backbone.hidden_size, backbone.vocab_size
    dims = base_dims(backbone.model)
    widths = sum(outputs for _, outputs in dims.modules.values())
    length = max(len(selection.example.tokens) for selection in longest)
    rows = min(
        options.rows_per_pass,
        config.num_streams * sum(len(selection.positions) for selection in longest),
    )
    scores = dims.num_heads * (length + options.segment_size * config.num_streams)
    per_layer = rows * (6 * h + 2 * widths + 3 * scores) * item
    depth = 2 if options.grad_checkpoint else config.num_msa_layers
    model = sum(array.nbytes for _, array in _flat(backbone))
    kept = len(longest) * length * (widths * config.num_msa_layers + 2 * h) * item
    head = 3 * min(CHUNK, rows) * V * 4
    streams = ADAM_COPIES * sum(array.nbytes for array in tensors.values())
    return int(model + kept + depth * per_layer + head + streams)


def _flat(backbone: Backbone) -> list[tuple[str, mx.array]]:
    flat: list[tuple[str, mx.array]] = tree_flatten(backbone.model.parameters())  # type: ignore[assignment]
    return flat


def check_memory(needed: int) -> None:
    """Refuse a run that cannot fit.

    Raises:
        OptionError: the estimate is beyond this machine's memory.
    """
    have = mx.device_info().get("memory_size") if hasattr(mx, "device_info") else None
    if isinstance(have, int) and needed > have > 0:
        raise OptionError(
            f"this run needs about {needed / 1e9:.1f} GB of memory and the machine has "
            f"{have / 1e9:.1f} GB; lower --rows-per-pass, --batch-size or --max-seq-length, or add "
            "--grad-checkpoint."
        )


def try_batch(run: Callable[[], object], share: float) -> Estimate:
    """Run the largest batch once without effect; an average one costs `share` of its time."""
    mx.reset_peak_memory()
    started = time.perf_counter()
    run()
    taken = time.perf_counter() - started
    return Estimate(taken * share, mx.get_peak_memory())
