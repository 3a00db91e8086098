"""A conversion, worked out before anything is written: what comes from where, and as what.

    options -> open the checkpoint -> sort names -> find the base -> check everything -> ConversionPlan

Every error a checkpoint can cause appears here, before the first byte is written; `--dry-run`
prints the plan and stops.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import StreamConfig
from ..errors import CheckpointError, OptionError
from ..weights.tensorfile import FLOATS
from .adapters import (
    LAYER,
    Merge,
    lora_deltas,
    read_adapters,
    refuse_more_than_lora,
    stream_tensors,
)
from .base import BasePlan, LoraPair, plan_base
from .configs import base_config, base_name
from .drafter_parts import Base
from .drafters import DrafterPlan, drafter_kind, plan_drafter
from .hub import locate
from .names import read_rules, sort_names
from .quantise import Quantisation
from .reader import CONFIG, Checkpoint, open_checkpoint, unread_weights
from .tensors import Tensor
from .tokenizers import tokenizer_files

_HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+")


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    source: str
    base: str | None = None
    revision: str | None = None
    dtype: str | None = None
    stream_dtype: str | None = None
    quantisation: Quantisation | None = None
    merge_lora: Merge = "none"
    adapter_only: bool = False
    rules: Path | None = None


@dataclass(frozen=True)
class StreamPlan:
    """What will be written of the streams."""

    config: StreamConfig
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Source:
    """What is converted, as it came: for those who want to compare.

    checkpoint: where the base comes from. weights: its tensors, in Hugging Face names.
    deltas: LoRA products to merge, by weight, and the adapter_config.json they come from.
    streams: as trained, in MLX names, nothing merged, and the fields that describe them.
    """

    checkpoint: Checkpoint
    weights: Mapping[str, Tensor]
    deltas: Mapping[str, LoraPair]
    adapter: Mapping[str, Any] | None
    streams: tuple[StreamConfig, dict[str, Tensor]] | None = None
    stream_fields: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ConversionPlan:
    """A whole conversion. `base` is None if the base was not at hand (adapter folder alone).

    A drafter that is not streams is written alone; its base is only compared.
    """

    options: Options
    path: Path
    base: BasePlan | None
    base_name: str | None
    streams: StreamPlan | None
    files: dict[str, Path | str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    source: Source | None = None
    drafter: DrafterPlan | None = None

    @property
    def writes_base(self) -> bool:
        """Whether base weights are written, not only used to check what belongs to them."""
        return self.base is not None and not self.options.adapter_only and self.drafter is None

    def tensors(self) -> list[Tensor]:
        """Every tensor that is written."""
        base = self.base.tensors if self.base and self.writes_base else ()
        adapters = [part.tensors for part in (self.streams, self.drafter) if part is not None]
        return [*base, *(tensor for tensors in adapters for tensor in tensors)]

    def num_bytes(self) -> int:
        """The bytes of all tensors written."""
        return sum(spec.nbytes for tensor in self.tensors() for spec in tensor.outputs)


def make_plan(options: Options) -> ConversionPlan:
    """Open what the user named and work out the conversion.

    Raises:
        CheckpointError: the checkpoint or base cannot be converted; one sentence.
        OptionError: options that contradict each other or the checkpoint.
        StreamsError: the streams do not fit the base.
    """
    path = locate(options.source, options.revision)
    checkpoint = open_checkpoint(path)
    if (kind := drafter_kind(checkpoint)) is not None:
        return _plan_drafter(kind, checkpoint, options)
    rules = read_rules(options.rules)
    everything = [*checkpoint.tensors.values(), *checkpoint.side.values()]
    own_base, named = sort_names(everything, rules)
    config, deltas = read_adapters(checkpoint, named, options.merge_lora)
    if options.adapter_only and (config is None or deltas):
        raise OptionError("--adapter-only needs streams, and adapters that are not merged.")
    refuse_more_than_lora(own_base.values())
    name = base_name(checkpoint.stream_fields, checkpoint.adapter_fields)
    base_checkpoint = _find_base(checkpoint, own_base, options.base or name, options)
    if base_checkpoint is None:
        assert config is not None
        alone = StreamPlan(config, stream_tensors(config, named, None, path, options.stream_dtype))
        note = "the base model was not at hand: the streams carry no fingerprint of it"
        return ConversionPlan(options, path, None, name, alone, notes=(note,))
    tensors = own_base
    if base_checkpoint is not checkpoint:
        tensors, stray = sort_names(base_checkpoint.tensors.values(), rules)
        if stray:
            raise CheckpointError(f"{base_checkpoint.path} holds the adapter tensor {min(stray)}.")
    base = _plan_base(base_checkpoint, tensors, deltas, options)
    streams = None
    trained = (config, named) if config is not None else None
    source = Source(
        base_checkpoint,
        tensors,
        deltas,
        checkpoint.adapter_fields,
        trained,
        checkpoint.stream_fields,
    )
    if config is not None:
        config, named, base = _merge_shared(config, named, base, base_checkpoint, tensors, options)
        streams = StreamPlan(
            config, stream_tensors(config, named, base.dims(), path, options.stream_dtype)
        )
    files = tokenizer_files(base_checkpoint)
    name = name if name and _HUB_ID.fullmatch(name) else _name_of(base_checkpoint, options)
    notes = _notes(base, streams, files)
    return ConversionPlan(options, path, base, name, streams, files, notes, source)


def _plan_drafter(kind: str, checkpoint: Checkpoint, options: Options) -> ConversionPlan:
    """Plan a drafter that is not streams, and its base's fingerprint if the base is at hand.

    The base is not fetched unless --base asks for it: it may be many gigabytes, and people have it
    as an MLX folder already.
    """
    if options.quantisation or options.dtype or options.rules or options.merge_lora != "none":
        raise OptionError(
            f"{checkpoint.path} holds a drafter ({kind}), not a model: it is converted with "
            "--base and --stream-dtype alone."
        )
    name = base_name(checkpoint.config)
    near = [path for path in (name, checkpoint.folder / (name or "")) if path and name]
    found = next((path for path in map(Path, near) if (path / CONFIG).is_file()), None)
    plan, base = None, None
    notes: tuple[str, ...] = ()
    if options.base or found:
        base_checkpoint = open_checkpoint(locate(options.base or str(found)))
        tensors, _ = sort_names(base_checkpoint.tensors.values())
        plan = _plan_base(base_checkpoint, tensors, {}, options)
        base = Base(plan.config, plan.dims())
        name = name if name and _HUB_ID.fullmatch(name) else _name_of(base_checkpoint, options)
    else:
        notes = ("the base model was not at hand: the drafter carries no fingerprint of it",)
    drafter = plan_drafter(kind, checkpoint, base, options.stream_dtype)
    return ConversionPlan(options, checkpoint.path, plan, name, None, notes=notes, drafter=drafter)


def _name_of(base: Checkpoint, options: Options) -> str:
    """Return a name to find the base by: a hub id if it has one, never a path of this machine."""
    own = base.config.get("_name_or_path") if base.config else None
    for name in (options.base, own, options.source):
        if isinstance(name, str) and _HUB_ID.fullmatch(name) and not Path(name).exists():
            return name
    return base.folder.resolve().name


def _find_base(
    checkpoint: Checkpoint,
    own_base: Mapping[str, Tensor],
    name: str | None,
    options: Options,
) -> Checkpoint | None:
    """Return where the base weights are; None if only an adapter folder is wanted without them."""
    if own_base:
        if options.base:
            raise OptionError("the checkpoint has base weights of its own; leave out --base.")
        return checkpoint
    if name is None:
        if options.adapter_only:
            return None
        raise CheckpointError(
            f"{checkpoint.path} holds no base weights and names no base model; "
            f"{unread_weights(checkpoint.folder) or 'give --base'}."
        )
    try:
        return open_checkpoint(locate(name, beside=checkpoint.folder))
    except CheckpointError as error:
        if options.adapter_only and not options.base:
            return None
        raise CheckpointError(
            f"the base model cannot be opened: {error} Give its folder as --base, or "
            "--adapter-only for the streams alone."
        ) from None


def _plan_base(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    deltas: Mapping[str, LoraPair],
    options: Options,
) -> BasePlan:
    path = checkpoint.folder / CONFIG
    if checkpoint.config is None:
        raise CheckpointError(f"{path} is missing; put the base model's config.json there.")
    if not tensors:
        raise CheckpointError(
            f"{checkpoint.path} holds no weights; "
            f"{unread_weights(checkpoint.folder) or 'expected safetensors, .bin, .pt, .pth, .ckpt or .gguf'}."
        )
    config = base_config(checkpoint.config, path)
    if deltas and "quantization" in config:
        raise OptionError("adapters cannot be merged into a quantised base; give full weights.")
    return plan_base(
        tensors,
        config,
        checkpoint.path,
        dtype=options.dtype,
        quantisation=options.quantisation,
        deltas=deltas,
    )


def _merge_shared(
    config: StreamConfig,
    named: dict[str, Tensor],
    base: BasePlan,
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    options: Options,
) -> tuple[StreamConfig, dict[str, Tensor], BasePlan]:
    """Merge shared adapters into the base, all or those below the MSA layers, if asked to."""
    if options.merge_lora == "none" or not config.lora_rank:
        return config, named, base
    if config.mode != "shared":
        raise OptionError(
            "--merge-lora would change what a lossless model says; it is for shared streams."
        )
    start = base.dims().num_layers - config.num_msa_layers
    merged = {
        name: each
        for name, each in named.items()
        if (match := LAYER.fullmatch(name))
        and (options.merge_lora == "all" or int(match[1]) < start)
    }
    base = _plan_base(
        checkpoint, tensors, lora_deltas(merged, config.lora_rank, config.lora_scale), options
    )
    if options.merge_lora == "all":
        config = dataclasses.replace(config, lora_rank=0, lora_alpha=0.0, target_modules=())
    return config, {name: each for name, each in named.items() if name not in merged}, base


def _notes(
    base: BasePlan, streams: StreamPlan | None, files: Mapping[str, Path | str]
) -> tuple[str, ...]:
    notes = []
    if not any(name.startswith("tokenizer.") for name in files):
        notes.append("no tokenizer was found beside the base model; mlx-lm will want one")
    if streams is None:
        notes.append("the checkpoint has no streams: the result is a plain mlx-lm model")
    if len({spec.dtype for tensor in base.tensors for spec in tensor.outputs} & set(FLOATS)) > 1:
        notes.append("the base mixes float types; --dtype makes them one")
    return tuple(notes)
