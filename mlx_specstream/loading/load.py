"""A model with its streams: `load` is mlx-lm's, underneath and in its signature.

What loads is checked before a token is decoded: the family is known, a probe through our view
gives mlx-lm's own logits, and the streams belong to this base.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import mlx.core as mx
import mlx.nn as nn

from ..errors import ModelError, OptionError, brief
from ..machine import ranks
from ..model.backbone import Backbone
from ..model.cache import KVCache
from ..model.prefill import PREFILL_CHUNK, ChunkSize, prefill_chunks
from ..model.probe import check_backbone
from ..speculation.drafters import Drafter
from ..speculation.randomness import share_seed
from ..speculation.streams import Streams
from ..weights.shipped import AUTO, find_streams
from .demo import DEMO_NAME
from .drafter import drafter_in, drafter_of_model, is_trained_drafter
from .folders import adapter_folder, model_folder
from .parallel import check_same_model, divided, own_arrays, refuse_undivided
from .tokenizer import check_tokenizer_files, decode_by_vocabulary

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

log = logging.getLogger("mlx_specstream")


@dataclass(frozen=True)
class StreamModel:
    """An mlx-lm model with the view that decodes it, and its streams or another drafter if it has any.

    `name` is what it was loaded as, `streams_name` where the streams or the drafter come from.
    """

    model: nn.Module
    backbone: Backbone
    streams: Streams | None = None
    name: str = ""
    streams_name: str = ""
    drafter: Drafter | None = None

    @classmethod
    def plain(cls, model: nn.Module) -> StreamModel:
        """Wrap a bare mlx-lm model, to be decoded without speculation.

        Raises:
            ModelError: its family is not supported, or the probe shows a difference to mlx-lm.
        """
        backbone = Backbone(model)
        check_backbone(backbone)
        return cls(model, backbone)

    def __call__(self, tokens: mx.array, *arguments: Any, **options: Any) -> mx.array:
        """Return the base model's logits (B, L, V) for tokens (B, L), as mlx-lm's models do."""
        logits: mx.array = self.model(tokens, *arguments, **options)
        return logits

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return the base model's own attribute, for code written for mlx-lm's models."""
            if name.startswith("__") or name == "model":
                raise AttributeError(name)
            return getattr(self.model, name)

    @property
    def layers(self) -> list[nn.Module]:
        """Return the decoder layers; lets mlx-lm's `make_prompt_cache` take this object."""
        layers: list[nn.Module] = self.model.layers
        return layers

    @property
    def context_length(self) -> int | None:
        """Return how many tokens the model was made for, if its config says so."""
        limit = getattr(getattr(self.model, "args", None), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    @property
    def drafting(self) -> str:
        """Return lossless or shared, or plain where nothing drafts but look-up."""
        if self.drafter is not None:
            return "lossless"
        return "plain" if self.streams is None else self.streams.config.mode

    def prefill(
        self, tokens: Sequence[int], cache: KVCache, chunk: ChunkSize = PREFILL_CHUNK
    ) -> Iterator[int]:
        """Append `tokens` to a cache a chunk at a time, yielding how many are done.

        For callers that do other work between chunks. The prompt's last token is not for here:
        `stream_generate` begins from it.
        """
        parts = (self.drafter, self.streams, self.backbone)
        forward = next(part.forward for part in parts if part is not None)
        return prefill_chunks(forward, tokens, cache, chunk)


@overload
def load(
    path_or_hf_repo: str,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: Literal[False] = False,
    revision: str | None = None,
    *,
    streams: str | Path | None = AUTO,
    streams_revision: str | None = None,
    pipeline: bool = False,
    draft_model: str | Path | None = None,
) -> tuple[StreamModel, TokenizerWrapper]: ...


@overload
def load(
    path_or_hf_repo: str,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    *,
    return_config: Literal[True],
    revision: str | None = None,
    streams: str | Path | None = AUTO,
    streams_revision: str | None = None,
    pipeline: bool = False,
    draft_model: str | Path | None = None,
) -> tuple[StreamModel, TokenizerWrapper, dict[str, Any]]: ...


def load(
    path_or_hf_repo: str,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    *,
    streams: str | Path | None = AUTO,
    streams_revision: str | None = None,
    pipeline: bool = False,
    draft_model: str | Path | None = None,
) -> tuple[StreamModel, TokenizerWrapper] | tuple[StreamModel, TokenizerWrapper, dict[str, Any]]:
    """Load a model, its tokenizer and its streams.

    Everything but the streams is as in `mlx_lm.load`; `demo` names the demo model. A folder here
    comes before the hub, where `owner/name@revision` pins a branch, tag or commit as `revision`
    does. Code that a model brings along is never fetched or run.

    Args:
        adapter_path: a folder of LoRA adapters, as mlx_lm.lora writes one.
        streams_revision: branch, tag or commit of streams on the hub.
        streams: `auto` (made here by `specstream adopt`, else in the model's folder, else shipped
            for this base, else none), None (decode plainly), a folder, a hub id or the name of a
            shipped set. A folder of another drafter is taken as one.
        draft_model: what drafts in place of streams: a smaller model of the same vocabulary, named
            as a model is, or a folder of a converted drafter (Medusa, Hydra, EAGLE).
        pipeline: among several processes (`mlx.launch`) divide the model by layers, even where each
            layer could be divided.

    Raises:
        ModelError: the model is missing, damaged, needs code of its own, is of an unsupported
            family, or does not compute the same through our view as in mlx-lm; or the draft model
            is, or has another vocabulary.
        StreamsError: the streams are missing, damaged, or of another base.
        OptionError: both streams and a draft model were named.
    """
    if draft_model is not None and streams not in (AUTO, None):
        raise OptionError("streams and a draft model cannot both draft; name one of them.")
    if draft_model is None and streams is not None and is_trained_drafter(streams):
        draft_model = streams
    together = ranks.group()
    if together is not None:
        refuse_undivided(adapter_path, draft_model)
    if adapter_path is not None:
        adapter_path = str(adapter_folder(adapter_path))
    folder = model_folder(path_or_hf_repo, revision)
    check_tokenizer_files(folder, path_or_hf_repo)
    check_same_model(folder)
    share_seed()
    model, tokenizer, config = _load_mlx_lm(
        folder,
        path_or_hf_repo,
        tokenizer_config,
        model_config,
        adapter_path,
        lazy or together is not None,
    )
    if path_or_hf_repo == DEMO_NAME and on_gpu():
        _halve(model, lazy)
    backbone = divided(model, pipeline=pipeline)
    if not lazy:
        if together is not None:
            mx.eval(own_arrays(backbone))
        if len(backbone.stages.own) == backbone.num_layers:
            check_backbone(backbone)
    if draft_model is not None:
        drafter = _drafter(str(draft_model), model, backbone, tokenizer)
        result = StreamModel(
            model, backbone, None, path_or_hf_repo, str(draft_model), drafter=drafter
        )
        return (result, tokenizer, config) if return_config else (result, tokenizer)
    weights = find_streams(streams, model, folder, streams_revision, adapter_path)
    joined = None
    if weights is not None:
        joined = Streams(backbone, weights.config, weights.tensors)
        if not lazy:
            joined.prepare()
            # What is not computed yet can only be computed in the thread that loaded it.
            mx.eval(joined.arrays)
    elif streams == AUTO:
        log.warning(
            "note: there are no streams for %s, so drafts come from look-up alone, where an answer "
            "repeats what is in the text.",
            path_or_hf_repo,
        )
    result = StreamModel(
        model, backbone, joined, path_or_hf_repo, str(weights.folder) if weights else ""
    )
    return (result, tokenizer, config) if return_config else (result, tokenizer)


def _drafter(
    name: str, model: nn.Module, backbone: Backbone, tokenizer: TokenizerWrapper
) -> Drafter:
    """Load what drafts: a folder of a trained drafter, here or on the hub, or a draft model."""
    folder = Path(name).expanduser()
    if not is_trained_drafter(folder):
        folder = model_folder(name)
    if is_trained_drafter(folder):
        return drafter_in(folder, model, backbone)
    draft, its_tokenizer, _ = _load_mlx_lm(folder, name, None, None, None, lazy=False)
    return drafter_of_model(name, draft, backbone, (tokenizer, its_tokenizer))


def on_gpu() -> bool:
    """Tell whether MLX computes on a GPU."""
    return mx.default_device() == mx.Device(mx.gpu)


def _halve(model: nn.Module, lazy: bool) -> None:
    """Turn the demo model's weights into float16, in place, for GPUs.

    They have few kernels for float32 at a few rows. The file that it was made of has 4 bits and
    float16 scales, so little is lost.
    """
    model.set_dtype(mx.float16)
    if not lazy:
        mx.eval(model.parameters())


def _load_mlx_lm(
    folder: Path,
    name: str,
    tokenizer_config: dict[str, Any] | None,
    model_config: dict[str, Any] | None,
    adapter_path: str | None,
    lazy: bool,
) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """Load a folder with mlx-lm, running no code from it; every failure becomes one sentence."""
    import mlx_lm
    from mlx_lm.utils import load_config

    tokenizer_config = dict(tokenizer_config or {})
    if tokenizer_config.get("trust_remote_code"):
        raise OptionError(
            "trust_remote_code is not supported: mlx-specstream never runs code that a model "
            "brings along; leave it out."
        )
    # None would make transformers ask on the terminal.
    tokenizer_config["trust_remote_code"] = False
    try:
        if load_config(folder).get("model_file"):
            raise ModelError(
                f"the model {name} wants to run Python code of its own (model_file), which "
                "mlx-specstream never does; use a model whose architecture mlx-lm knows."
            )
        loaded = mlx_lm.load(
            str(folder),
            tokenizer_config=tokenizer_config,
            model_config=model_config,
            adapter_path=adapter_path,
            lazy=lazy,
            return_config=True,
        )
        # A truncated file only shows when its last tensor is read.
        if not lazy:
            mx.eval(loaded[0].parameters())
    except ModelError:
        raise
    except Exception as error:  # whatever mlx, mlx-lm, transformers and tokenizers raise
        both = f" with the adapters {adapter_path}" if adapter_path else ""
        raise ModelError(
            f"the model {name}{both} cannot be loaded: {brief(error)}; its files are damaged or "
            "incomplete, or this version of mlx-lm does not know it."
        ) from error
    model, tokenizer, config = loaded
    return model, decode_by_vocabulary(tokenizer), config
