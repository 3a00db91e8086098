"""The tensors that streams consist of: names and shapes, and whether a set of them is whole.

`stream_shapes` names every tensor that a file of such streams must hold, so a missing, unknown or
misshapen one is an error and never silent nonsense later. Knows names and shapes, not files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..config import StreamConfig
from ..errors import StreamsError, shown
from .fingerprint import BaseDims
from .tensorfile import difference

MAX_LAYERS = 4096
_LAYER = re.compile(r"layers\.(0|[1-9]\d{0,4})\.(.+)")


def stream_shapes(
    config: StreamConfig, dims: BaseDims, *, all_layers: bool = False, gates: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that streams of this config have on such a base.

    γ = 4, h = 576, N = 30, N_s = 1, rank 8 on q:
        stream_embeddings                  (4, 576)
        layers.29.self_attn.q_proj.lora_a  (576, 8)
        layers.29.self_attn.q_proj.lora_b  (8, 576)

    `all_layers`: adapters on lower layers too (shared mode only). `gates`: `layers.{i}.stream_gate`
    (heads,).

    Raises:
        StreamsError: more MSA layers than layers, or an adapted module that the base does not have.
    """
    h, N = dims.hidden_size, dims.num_layers
    if config.num_msa_layers > N:
        raise StreamsError(
            f"the streams want {config.num_msa_layers} MSA layers but the base model has {N}"
            " layers; use the base they were trained on."
        )
    shapes: dict[str, tuple[int, ...]] = {"stream_embeddings": (config.num_streams, h)}
    for part, rank in (
        ("stream_init", config.stream_init_rank),
        ("next_token", config.next_token_rank),
        ("pruner", config.pruner_rank),
    ):
        if rank:
            shapes |= {f"{part}.lora_a": (h, rank), f"{part}.lora_b": (rank, h)}
    if config.conditioner_rank:
        hidden, rank = config.conditioner_hidden, config.conditioner_rank
        seen = (1 + config.conditioner_tokens) * h
        shapes |= {"conditioner.mlp_in": (hidden, seen), "conditioner.mlp_out": (h, hidden)}
        shapes |= {"conditioner.lora_a": (h, rank), "conditioner.lora_b": (rank, h)}
    msa_start = N - config.num_msa_layers
    for layer in range(0 if all_layers else msa_start, N):
        for module in config.target_modules:
            modules = dims.modules_of(layer)
            if module not in modules:
                raise StreamsError(
                    f"the streams adapt the module {shown(module)}, which the base model's layer"
                    f" {layer} does not have; it has {', '.join(modules)}."
                )
            inputs, outputs = modules[module]
            name = f"layers.{layer}.{module}"
            shapes |= {
                f"{name}.lora_a": (inputs, config.lora_rank),
                f"{name}.lora_b": (config.lora_rank, outputs),
            }
        if gates and layer >= msa_start:
            shapes[f"layers.{layer}.stream_gate"] = (dims.num_heads,)
    return shapes


def shapes_by_names(
    config: StreamConfig, names: Iterable[str], dims: BaseDims
) -> dict[str, tuple[int, ...]]:
    """Return `stream_shapes` of streams that have tensors of these names.

    Shared streams may adapt layers below the MSA layers, and may have gates: the names say so.

    Raises:
        StreamsError: as `stream_shapes`.
    """
    lower = gates = False
    if config.mode == "shared":
        names = list(names)
        layers = [int(match[1]) for name in names if (match := _LAYER.fullmatch(name))]
        lower = bool(layers) and min(layers) < dims.num_layers - config.num_msa_layers
        gates = any(name.endswith(".stream_gate") for name in names)
    return stream_shapes(config, dims, all_layers=lower, gates=gates)


def check_tensors(
    config: StreamConfig,
    found: dict[str, tuple[int, ...]],
    path: str,
    dims: BaseDims | None = None,
) -> None:
    """Compare names and shapes of stream tensors with what config (and base, if given) ask for.

    Raises:
        StreamsError: the first difference, with both shapes.
    """
    if dims is None:
        dims = _dims_from_tensors(config, found, path)
    if odd := difference(found, shapes_by_names(config, found, dims)):
        raise StreamsError(f"{path}: {odd}.")


def _dims_from_tensors(
    config: StreamConfig, found: dict[str, tuple[int, ...]], path: str
) -> BaseDims:
    """Derive the base's sizes from the tensors, to check that they agree with each other."""
    embeddings = found.get("stream_embeddings")
    if (
        embeddings is None
        or len(embeddings) != 2
        or embeddings[0] != config.num_streams
        or embeddings[1] < 1
    ):
        given = "missing" if embeddings is None else f"of shape {embeddings}"
        raise StreamsError(
            f"{path}: stream_embeddings is {given}, expected ({config.num_streams}, width of the"
            " base model)."
        )
    if config.num_msa_layers > MAX_LAYERS:
        raise StreamsError(
            f"{path}: {config.num_msa_layers} MSA layers are more than any model has layers;"
            " correct num_msa_layers."
        )
    layers, heads = [config.num_msa_layers - 1], 1
    modules: dict[str, tuple[int, int]] = {}
    by_layer: dict[int, dict[str, tuple[int, int]]] = {}
    for name, shape in found.items():
        if not (match := _LAYER.fullmatch(name)) or not shape:
            continue
        layers.append(int(match[1]))
        module, _, part = match[2].rpartition(".")
        if part == "lora_a" and module in config.target_modules:
            outputs = found.get(f"layers.{match[1]}.{module}.lora_b", (0, 0))
            widths = (shape[0], outputs[-1] if outputs else 0)
            modules.setdefault(module, widths)
            by_layer.setdefault(int(match[1]), {})[module] = widths
        elif match[2] == "stream_gate":
            heads = shape[0]
    if missing := [module for module in config.target_modules if module not in modules]:
        raise StreamsError(
            f"{path}: the adapters of {missing[0]} are missing although target_modules lists it."
        )
    return BaseDims(
        hidden_size=embeddings[1],
        num_layers=max(layers) + 1,
        num_heads=heads,
        modules=modules,
        by_layer={layer: {**modules, **own} for layer, own in by_layer.items()},
    )
