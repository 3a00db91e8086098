"""Published drafters, read: Medusa's heads, Hydra's heads, EAGLE's layer of either generation.

    found by its tensors' names                          from
    0.0.linear.weight, 0.1.weight, ...                   FasterDecoding/Medusa: medusa_lm_head.pt
    hydra_mlp.0.0.linear.weight, hydra_lm_head.0.weight  zankner/Hydra: hydra_lm_head.pt
    fc.weight, layers.0.self_attn.q_proj.weight          SafeAILab/EAGLE (1 and 2): pytorch_model.bin
    fc.weight, midlayer.hidden_norm.weight, d2t          EAGLE-3, and SpecForge's

Copies of the base's token embeddings, which all of them train frozen, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DrafterConfig
from ..errors import CheckpointError, StreamsError, brief, shown
from ..weights.drafter import drafter_shapes
from ..weights.tensorfile import difference
from .base import DTYPES
from .drafter_heads import HYDRA_MLP, MEDUSA, read_hydra, read_medusa
from .drafter_layers import read_eagle, read_eagle3
from .drafter_parts import Base, Read
from .names import unwrapped
from .reader import CONFIG, Checkpoint
from .tensors import Tensor


@dataclass(frozen=True)
class DrafterPlan:
    """What will be written of a drafter."""

    config: DrafterConfig
    tensors: tuple[Tensor, ...]


def drafter_kind(checkpoint: Checkpoint) -> str | None:
    """Return the kind of drafter that a checkpoint is by its tensors' names; None if it is none."""
    names = {unwrapped(name) for name in checkpoint.tensors}
    if any(HYDRA_MLP.fullmatch(name.removeprefix("hydra_head.")) for name in names):
        return "hydra"
    if "fc.weight" in names:
        if names & {"midlayer.hidden_norm.weight", "layers.0.hidden_norm.weight"}:
            return "eagle3"
        if "layers.0.self_attn.q_proj.weight" in names:
            return "eagle"
    if any((m := MEDUSA.fullmatch(name)) and m["rest"] == "linear.weight" for name in names):
        return "medusa"
    return None


def plan_drafter(
    kind: str, checkpoint: Checkpoint, base: Base | None, dtype: str | None
) -> DrafterPlan:
    """Plan the tensors of a published drafter, renamed and checked.

    base: what it was trained for, if that is at hand. dtype: float16, bfloat16 or float32; None for
    each tensor's own.

    Raises:
        CheckpointError: a tensor is unknown, missing, misshapen or not of floats, or the config does
            not say what is needed.
        StreamsError: the drafter's sizes make no sense.
    """
    path = checkpoint.folder / CONFIG
    named: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        plain = unwrapped(name)
        if plain in named:
            raise CheckpointError(
                f"two tensors of {checkpoint.path} mean {shown(plain)}; remove one."
            )
        named[plain] = tensor
    fields = dict(checkpoint.config or {})
    try:
        config, renamed = _READERS[kind](named, fields, base, path)
    except StreamsError as error:
        raise CheckpointError(f"{checkpoint.path}: {brief(error, 500)}.") from None
    found = {name: tensor.shape for name, tensor in renamed.items()}
    called = {name: tensor.sources[0][1] for name, tensor in renamed.items()}
    if odd := difference(found, drafter_shapes(config), called):
        raise CheckpointError(f"{checkpoint.path}: {odd}; check that config.json belongs to it.")
    _check_fits(config, base, checkpoint.path)
    tensors = []
    for name, tensor in sorted(renamed.items()):
        tensor = tensor.renamed(name)
        if name != "d2t":
            if not tensor.is_float:
                raise CheckpointError(
                    f"{checkpoint.path}: {name} is {tensor.dtype}, expected floats."
                )
            tensor = tensor.cast(DTYPES[dtype]) if dtype else tensor
        tensors.append(tensor)
    return DrafterPlan(config, tuple(tensors))


def _check_fits(config: DrafterConfig, base: Base | None, path: Path) -> None:
    """Make sure that a base, if it is at hand, has what the drafter builds on."""
    if base is None:
        return
    vocabulary = base.config.get("vocab_size")
    last = max(config.feature_layers, default=0)
    for what, wanted, has, fits in (
        (
            "of width",
            config.hidden_size,
            (width := base.dims.hidden_size),
            config.hidden_size == width,
        ),
        ("of layers up to", last, base.dims.num_layers - 1, last < base.dims.num_layers),
        ("of tokens", config.vocab_size, vocabulary, config.vocab_size <= (vocabulary or 1 << 31)),
    ):
        if not fits:
            raise CheckpointError(
                f"{path} is a drafter for a model {what} {wanted}, and the base has {has}; give the "
                "base it was trained on."
            )


_READERS: dict[str, Callable[[Mapping[str, Tensor], dict[str, Any], Base | None, Path], Read]] = {
    "medusa": read_medusa,
    "hydra": read_hydra,
    "eagle": read_eagle,
    "eagle3": read_eagle3,
}
