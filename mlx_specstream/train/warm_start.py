"""What a run takes over from trained streams: everything they know, and parts they still lack.

`--resume-adapter-file` gives a run trained streams to start from; their shape wins over the shape
options. What may be added: a pruner; knowledge of the next token, and of a second one in the
conditioner, which change nothing at first; and, for lossless streams, shared mode [SS §3.1.1]:

    upper layers    A, B as trained, B times `start_scale`: main rows must now bear what was made
                    for stream rows alone
    lower layers    new adapters, zero output
    gates           `gate_start`: main hardly sees its streams at first
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from ..config import StreamConfig
from ..errors import OptionError
from ..model.backbone import Backbone
from ..weights.checkpoint import StreamWeights
from .initialise import untrained
from .loss import Tensors
from .options import TrainOptions

PRUNER_RANK = 8
"""The paper's [SS §4.1]; taken when a pruner is wanted and no rank is named."""


def warm_start(
    given: StreamWeights, options: TrainOptions, backbone: Backbone, rms: float
) -> tuple[StreamConfig, Tensors]:
    """Return the config and the weights to start from.

    Raises:
        OptionError: shared-mode streams are to be trained as lossless ones, or streams that know the
            next token as shared ones.
    """
    config = given.config
    if config.mode == "shared" and options.mode != "shared":
        raise OptionError(
            "these streams were trained in shared mode and cannot become lossless; add --mode "
            "shared, or start from other streams."
        )
    becomes_shared = config.mode != options.mode
    if becomes_shared and config.next_token_rank:
        raise OptionError(
            "these streams know the next token, which streams of shared mode cannot; start from others."
        )
    if becomes_shared:
        config = replace(config, mode="shared", pruner_rank=0)
    rank = options.pruner_rank or (PRUNER_RANK if options.part == "pruner" else 0)
    if rank and not config.pruner_rank:
        config = replace(config, pruner_rank=rank)
    config = replace(
        config,
        next_token_rank=config.next_token_rank or options.next_token_rank,
        conditioner_tokens=max(
            config.conditioner_tokens, options.conditioner_tokens if config.conditioner_rank else 1
        ),
    )
    if config == given.config:
        return config, dict(given.tensors)
    start = untrained(backbone, config, rms, options.seed, options.gate_start)
    for name in start.keys() & given.tensors.keys():
        tensor = given.tensors[name]
        scaled = becomes_shared and name.startswith("layers.") and name.endswith(".lora_b")
        if name == "conditioner.mlp_in":  # columns of a token that was not seen before are zero
            tensor = mx.pad(tensor, [(0, 0), (0, start[name].shape[1] - tensor.shape[1])])
        start[name] = tensor * options.start_scale if scaled else tensor
    return config, start
