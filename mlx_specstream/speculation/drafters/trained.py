"""The drafter that a folder's weights are, over one model."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ...config import DrafterConfig
from ...errors import StreamsError
from ...model.backbone import Backbone
from .drafter import Drafter
from .eagle import EagleDrafter
from .hydra import HydraDrafter, HydraPlusDrafter
from .medusa import MedusaDrafter


def trained_drafter(
    backbone: Backbone, config: DrafterConfig, tensors: Mapping[str, mx.array]
) -> Drafter:
    """Return trained weights as a drafter of their base.

    Raises:
        StreamsError: they are for another width, more tokens or more layers than the model has.
    """
    for what, wanted, found in (
        ("a width of", config.hidden_size, backbone.hidden_size),
        ("a vocabulary of at least", config.vocab_size, backbone.vocab_size),
        (
            "at least a number of layers of",
            max(config.feature_layers, default=0),
            backbone.num_layers,
        ),
    ):
        if wanted > found or (what == "a width of" and wanted != found):
            raise StreamsError(
                f"this {config.kind} drafter needs a model with {what} {wanted}, and this one has "
                f"{found}; load it with the model it was trained on."
            )
    if config.kind == "medusa":
        return MedusaDrafter(backbone, config, tensors)
    if config.kind == "hydra":
        hydra = HydraDrafter if config.layer is None else HydraPlusDrafter
        return hydra(backbone, config, tensors)
    return EagleDrafter(backbone, config, tensors)
