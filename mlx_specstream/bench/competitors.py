"""The competitors, ready to answer: one model in memory, with all streams and decoders around it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..config import DecodeConfig
from ..errors import ModelError, OptionError, StreamsError
from ..loading.drafter import drafter_in, is_trained_drafter
from ..loading.folders import model_folder
from ..loading.load import StreamModel, load
from ..speculation.streams import Streams
from ..weights.fingerprint import fingerprint
from ..weights.shipped import AUTO, SHIPPED, find_streams, shipped_for
from .measure import TimedAnswer, mlx_lms, ours
from .methods import Method, parse_streams

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


NO_STREAMS = "none"


@dataclass
class Competitors:
    """The model with everything that competes on it.

    methods: by name; those without streams of their own have them resolved. by_streams: the
    model joined to each set of streams. drafter: mlx-lm's draft model, if one competes.
    """

    model: StreamModel
    tokenizer: TokenizerWrapper
    methods: dict[str, Method]
    by_streams: dict[str, StreamModel]
    drafter: nn.Module | None = None
    configs: dict[str, DecodeConfig] = field(default_factory=dict)

    def answer(self, name: str, category: str, prompt: list[int], max_tokens: int) -> TimedAnswer:
        """Return the answer to a prompt with the method of that name, not begun yet."""
        method, model = self.methods[name], self.model
        if method.kind == "streams":
            joined = self.by_streams[method.streams_for(category)]
            config = self.configs[name]
            return ours(joined, self.tokenizer, prompt, max_tokens, config)
        if method.kind == "plain":
            return ours(model, self.tokenizer, prompt, max_tokens, None)
        drafter = self.drafter if method.kind == "draft-model" else None
        return mlx_lms(
            model.model, self.tokenizer, prompt, max_tokens, drafter, method.num_draft_tokens
        )

    def streams_of(self, name: str) -> dict[str, StreamModel]:
        """Return the model joined to each set of streams that a method uses."""
        default, others = parse_streams(self.methods[name].streams)
        return {streams: self.by_streams[streams] for streams in (default, *others.values())}

    def first_streams(self, category: str) -> str:
        """Return the streams that the first method with any uses for a category.

        Raises:
            OptionError: no method has streams.
        """
        for method in self.methods.values():
            if method.kind == "streams":
                return method.streams_for(category)
        raise OptionError("trees can only be compared with streams; leave out --streams none.")


def open_competitors(
    model_name: str,
    adapter_path: str | None,
    methods: dict[str, Method],
    categories: list[str],
    draft_model: str | None,
) -> Competitors:
    """Load the model, and all that the methods need.

    Raises:
        ModelError, StreamsError, OptionError: something cannot be loaded or used.
    """
    configs = {
        name: setting_config(method) for name, method in methods.items() if method.kind == "streams"
    }
    folder = model_folder(model_name)
    model, tokenizer = load(str(folder), adapter_path=adapter_path, streams=None)
    if len(model.backbone.stages.own) < model.backbone.num_layers:
        raise OptionError(
            "bench measures mlx-lm's own decoding beside ours, which cannot run a model divided by "
            "layers; start as many processes as divide its heads, or use specstream verify."
        )
    resolved, by_streams = {}, {}
    for name, method in methods.items():
        if method.kind == "streams":
            text = method.streams
            if parse_streams(text)[0] == AUTO:
                text = _automatic(text, model, model_name, adapter_path, categories)
            method = Method(**{**method.to_dict(), "streams": text})  # type: ignore[arg-type]
            default, others = parse_streams(text)
            for streams in (default, *others.values()):
                if streams == NO_STREAMS:  # look-up alone
                    by_streams[streams] = model
                elif streams not in by_streams and is_trained_drafter(streams):
                    drafting = drafter_in(Path(streams).expanduser(), model.model, model.backbone)
                    by_streams[streams] = replace(model, streams_name=streams, drafter=drafting)
                elif streams not in by_streams:
                    weights = find_streams(streams, model.model, folder, adapter_path=adapter_path)
                    assert weights is not None
                    joined = Streams(model.backbone, weights.config, weights.tensors)
                    by_streams[streams] = StreamModel(
                        model.model, model.backbone, joined, model_name, str(weights.folder)
                    )
        resolved[name] = method
    drafter = None
    if draft_model is not None:
        drafter = _draft_model(draft_model, tokenizer)
    return Competitors(model, tokenizer, resolved, by_streams, drafter, configs)


def setting_config(method: Method) -> DecodeConfig:
    """Return the config of a method with streams, as the command line would make it.

    Raises:
        OptionError: a value cannot be read.
    """
    return DecodeConfig.of_words(
        method.tree,
        prune=method.prune,
        schedule=method.schedule,
        use_conditioner=method.conditioning,
        drafts=method.drafts,
    )


def _automatic(
    text: str, model: StreamModel, name: str, adapter_path: str | None, categories: list[str]
) -> str:
    """Name the streams that `auto` finds, with shipped sets for the categories they are made for.

    A shipped set belongs to a category if its name ends in it: `demo-sql`.
    """
    folder = model_folder(name)
    weights = find_streams(AUTO, model.model, folder, adapter_path=adapter_path)
    if weights is None:
        raise StreamsError(
            f"there are no streams for {name}, so speculation cannot be measured; name some with "
            "--streams, or compare the others with --streams none."
        )
    if weights.folder.parent != SHIPPED:
        return ",".join([str(weights.folder), *text.split(",")[1:]])
    words = [weights.folder.name, *text.split(",")[1:]]
    named = {word.partition("=")[0] for word in words[1:]}
    for category in dict.fromkeys(categories):
        found = None if category in named else shipped_for(category, model.model)
        if found is not None and found.folder != weights.folder:
            words.append(f"{category}={found.folder.name}")
    return ",".join(words)


def _draft_model(name: str, tokenizer: TokenizerWrapper) -> nn.Module:
    """Load mlx-lm's draft model, which must have the model's own tokens."""
    loaded, its_tokenizer = load(name, streams=None)
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"the draft model {name} has other tokens than the model; name one of the same family."
        )
    return loaded.model


def described_model(competitors: Competitors, name: str) -> dict[str, Any]:
    """Return what a result says of the model and its streams, in JSON's terms."""
    backbone, module = competitors.model.backbone, competitors.model.model
    parameters = _arrays(module)
    return {
        "name": Path(name).name if Path(name).expanduser().exists() else name,
        "family": type(module).__module__.rpartition(".")[2],
        "fingerprint": fingerprint(module),
        "dtype": str(backbone.dtype).rpartition(".")[2],
        "bits": _bits(module),
        "layers": backbone.num_layers,
        "hidden_size": backbone.hidden_size,
        "vocab_size": backbone.vocab_size,
        "params": _num_params(module),
        "layer_params": sum(map(_num_params, backbone.layers)) // backbone.num_layers,
        "head_params": backbone.vocab_size * backbone.hidden_size,
        "weight_bytes": sum(array.nbytes for array in parameters),
        "used": {
            method_name: method.streams
            for method_name, method in competitors.methods.items()
            if method.kind == "streams"
        },
        "streams": {
            Path(streams).name: {
                "num_streams": joined.streams.config.num_streams,
                "num_msa_layers": joined.streams.config.num_msa_layers,
                "mode": joined.streams.config.mode,
                "conditioned": bool(joined.streams.config.conditioner_rank),
            }
            for streams, joined in competitors.by_streams.items()
            if joined.streams is not None
        },
    }


def _num_params(module: nn.Module) -> int:
    """Return how many weights a module has; packed ones count as what they stand for."""
    from mlx_lm.utils import get_total_parameters

    return int(get_total_parameters(module))


def _bits(module: nn.Module) -> int:
    """Return the bits of a weight: those of quantised layers, else of the largest tensor."""
    quantised = {int(layer.bits) for _, layer in module.named_modules() if hasattr(layer, "bits")}
    if quantised:
        return min(quantised)
    largest = max(_arrays(module), key=lambda array: array.size)
    return 8 * int(mx.array([], dtype=largest.dtype).itemsize)


def _arrays(module: nn.Module) -> list[mx.array]:
    return [
        array for _, array in cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))
    ]
