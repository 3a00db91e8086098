"""The models of the cases: tiny, random, of every family that this installation can decode."""

from __future__ import annotations

from functools import cache, lru_cache

import mlx.core as mx
import mlx.nn as nn

from mlx_specstream.config import Mode, StreamConfig
from mlx_specstream.errors import ModelError
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.probe import check_backbone
from mlx_specstream.speculation.streams import Streams
from tests.support.random_streams import linear_modules, random_tensors
from tests.support.tiny_models import family_modules, tiny_random_model

NUM_STREAMS = 3
HEAD_DIM = 32  # a group of quantised rows; heads are a quarter as many as the table's sizes say
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16}


def supported_families(mode: Mode = "lossless") -> list[str]:
    """Return the names of the families that can be decoded, found by trying.

    In shared mode none with recurrent layers: their main stream would have to see streams.
    """
    found = []
    for name in family_modules():
        try:
            backbone = Backbone(tiny_random_model(name))
            check_backbone(backbone)
        except (ModelError, ImportError, SystemExit):
            continue
        except Exception:
            continue
        if mode == "lossless" or not backbone.is_recurrent:
            found.append(name)
    return found


@lru_cache(maxsize=8)
def streams_for(
    family: str, seed: int, precision: str, wide_heads: bool, mode: Mode = "lossless"
) -> Streams:
    """Return random streams over a random model; `wide_heads` for caches that are quantised.

    A family whose heads' width follows from other sizes keeps its narrow ones. Streams of shared
    mode have gates where the number of heads is known.
    """
    if wide_heads and not _has_wide_heads(family):
        wide_heads = False
    sizes = {"head_dim": HEAD_DIM} if wide_heads else {}
    model = tiny_random_model(family, seed=seed, **sizes)
    if precision in DTYPES:
        model.set_dtype(DTYPES[precision])
    elif precision != "float32":
        packing = "affine" if precision == "4-bit" else precision
        nn.quantize(model, group_size=32, bits=4, mode=packing, class_predicate=_can_be_quantised)
    mx.eval(model.parameters())
    backbone = Backbone(model)
    layers = min(2, backbone.num_layers - 1)
    modules = linear_modules(backbone, 0 if mode == "shared" else backbone.num_layers - layers)
    config = StreamConfig(
        num_streams=NUM_STREAMS,
        num_msa_layers=layers,
        stream_init_rank=3,
        lora_rank=4 if modules else 0,
        lora_alpha=8.0,
        target_modules=modules,
        pruner_rank=2,
        conditioner_rank=3,
        conditioner_hidden=5,
        mode=mode,
    )
    if mode == "lossless":
        return Streams(backbone, config, random_tensors(backbone, config, seed))
    gates = seed != 1 and hasattr(getattr(model, "args", None), "num_attention_heads")
    # Adapters of all rows and layers add up: small ones leave logits in a range of some units.
    tensors = random_tensors(backbone, config, seed, scale=0.1, gates=gates)
    return Streams(backbone, config, tensors)


@cache
def _has_wide_heads(family: str) -> bool:
    """Tell whether a model of the family with wider heads can be made and run."""
    try:
        check_backbone(Backbone(tiny_random_model(family, head_dim=HEAD_DIM)))
    except Exception:
        return False
    return True


def _can_be_quantised(_: str, module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        hasattr(module, "to_quantized")
        and isinstance(weight, mx.array)
        and weight.shape[-1] % 32 == 0
    )
