"""What callers give as they would give it to mlx-lm, checked and brought into our own form."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from ..config import MAX_STREAMS, CacheConfig, DecodeConfig, TreeSpec
from ..config.bounds import whole
from ..errors import DataError, OptionError, brief, shown, whole_text
from ..loading.load import StreamModel
from ..model.cache import KVCache, from_mlx_lm
from ..model.cache.kinds import check_quantised, quantization
from ..speculation.drafters.lookup import FileIndex
from ..speculation.sampling import LogitsProcessor, Sampler

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

log = logging.getLogger("mlx_specstream")

Prompt = str | Sequence[int] | mx.array

# mlx-lm's options that are not supported; None means that they are not in use.
_UNSUPPORTED = ("input_embeddings", "stream")


def refuse_unknown(options: dict[str, Any]) -> None:
    """Refuse options of mlx-lm that would otherwise be ignored, and words nobody knows.

    Raises:
        OptionError: there is one.
    """
    for name, value in options.items():
        if name in _UNSUPPORTED:
            if value is not None:
                raise OptionError(
                    f"the option {name} of mlx-lm is not supported yet; leave it out, or use "
                    "mlx-lm itself for this."
                )
        else:
            raise OptionError(f"stream_generate has no option {name!r}.")


def with_chain(config: DecodeConfig | None, num_draft_tokens: int) -> DecodeConfig:
    """Return a config whose tree is a chain of so many drafts, as mlx-lm's draft models make it.

    Raises:
        OptionError: no such chain.
    """
    if not 1 <= num_draft_tokens <= MAX_STREAMS:
        raise OptionError(
            f"num_draft_tokens must be 1 to {MAX_STREAMS}, got {num_draft_tokens}; or name a tree."
        )
    chain = TreeSpec(kind="chain", branching=1, depth=num_draft_tokens)
    return replace(config or DecodeConfig(), tree=chain)


def wrapped_tokenizer(tokenizer: Any) -> TokenizerWrapper:
    """Return a tokenizer as mlx-lm hands one to its callers."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    return tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)


def needed_sampler(sampler: Sampler | None) -> Sampler | None:
    """Return None for mlx-lm's greedy sampler, which needs no log-probabilities.

    Raises:
        OptionError: it is no function.
    """
    from mlx_lm import sample_utils

    if sampler is not None:
        refuse_uncallable("sampler", sampler)
    return None if sampler is getattr(sample_utils, "greedy_sampler", None) else sampler


def needed_processors(
    processors: Sequence[LogitsProcessor] | None,
) -> tuple[LogitsProcessor, ...]:
    """Return logits processors, none for None.

    Raises:
        OptionError: they are no list of functions.
    """
    if processors is not None and not isinstance(processors, Sequence):
        raise OptionError(
            f"logits_processors must be a list of functions, got {shown(processors)}."
        )
    for process in processors or ():
        refuse_uncallable("each of logits_processors", process)
    return tuple(processors or ())


def refuse_uncallable(name: str, value: object) -> None:
    """Refuse what is no function where one is needed.

    Raises:
        OptionError: it is none.
    """
    if not callable(value):
        raise OptionError(f"{name} must be a function, got {shown(value)}.")


def needed_seed(seed: int | None) -> int | None:
    """Return a seed as Python's own number; of a larger one the low 64 bits count.

    Raises:
        OptionError: it is no whole number.
    """
    return None if seed is None else whole(seed, None, None, "seed must be a whole number")


def needed_config(config: DecodeConfig | None) -> DecodeConfig:
    """Return a decode config, the default one for None.

    Raises:
        OptionError: it is something else.
    """
    if config is not None and not isinstance(config, DecodeConfig):
        raise OptionError(
            f"config must be a DecodeConfig, such as DecodeConfig.parse('16:8'), got {shown(config)}."
        )
    return config or DecodeConfig()


def prompt_ids(tokenizer: TokenizerWrapper, prompt: Prompt, vocab_size: int) -> list[int]:
    """Return a prompt's token ids; a text gets its special tokens unless it begins with them.

    Raises:
        OptionError: the prompt is empty, is neither a text nor ids, or holds ids the model does
            not have.
    """
    if isinstance(prompt, str):
        bos = tokenizer.bos_token
        special = bos is None or not prompt.startswith(bos)
        ids = list(tokenizer.encode(whole_text(prompt, "the prompt"), add_special_tokens=special))
        ids = ids if prompt else []
    else:
        ids = _given_ids(prompt)
    if not ids:
        raise OptionError("the prompt is empty; give at least one token.")
    if wrong := [token for token in ids if not 0 <= token < vocab_size]:
        raise OptionError(
            f"the prompt holds the token id {shown(wrong[0])}, but the model's ids are 0 to "
            f"{vocab_size - 1}; encode it with the model's own tokenizer."
        )
    return ids


def _given_ids(prompt: Any) -> list[int]:
    """Return the ids of a prompt that is no text, as Python's own numbers."""
    if isinstance(prompt, mx.array | np.ndarray):
        if prompt.ndim != 1:
            raise OptionError(f"a prompt of ids must have one dimension, got shape {prompt.shape}.")
        prompt = prompt.tolist()
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | Mapping | Set):
        raise OptionError(f"a prompt must be a text or a list of token ids, got {shown(prompt)}.")
    values = [
        each.item() if isinstance(each, mx.array) and not each.ndim else each for each in prompt
    ]
    sentence = "a prompt must be a text or a list of token ids, which are whole numbers"
    return [whole(value, None, None, sentence) for value in values]


def cache_for(
    model: StreamModel, given: KVCache | list[Any] | None, config: CacheConfig
) -> KVCache:
    """Return the cache to decode in: the given one, a copy of mlx-lm's layers, or a new one.

    Raises:
        OptionError: it is none, has another number of layers than the model, or the config does
            not fit.
    """
    backbone = model.backbone
    check_quantised(backbone.forward, backbone.windows, config)
    if given is None:
        return backbone.new_cache(config)
    size = len(given.layers) if isinstance(given, KVCache) else len(given)
    if size != backbone.num_layers:
        raise OptionError(
            f"the prompt cache has {size} layers and the model {backbone.num_layers}; make it for "
            "this model."
        )
    if config.max_kv_size is not None:
        log.warning("note: max_kv_size is for new caches; the one that was given keeps its size.")
    if not isinstance(given, KVCache):
        return from_mlx_lm(given, backbone.windows, quantization(config))
    if config.kv_bits is not None:
        given.quantize = quantization(config)
    return given


def file_index(
    tokenizer: TokenizerWrapper, files: Sequence[str | Path], vocab_size: int
) -> FileIndex:
    """Return the tokens of text files, indexed for look-up; made once for a tokenizer and files.

    vocab_size: of the model; ids beyond, which it cannot read, are left out.

    Raises:
        DataError: a file cannot be read as text.
    """
    key = []
    for file in files:
        path = Path(file).expanduser()
        try:
            key.append((path, path.stat().st_mtime_ns))
        except OSError as error:
            raise unreadable(path, error) from None
    known = _indices.setdefault(tokenizer, {})
    if tuple(key) not in known:
        tokens: list[int] = []
        for path, _ in key:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise unreadable(path, error) from None
            ids = tokenizer.encode(text, add_special_tokens=False)
            tokens += [token for token in ids if token < vocab_size]
        known.clear()
        known[tuple(key)] = FileIndex(tokens)
    return known[tuple(key)]


_indices: WeakKeyDictionary[TokenizerWrapper, dict[tuple[tuple[Path, int], ...], FileIndex]]
_indices = WeakKeyDictionary()


def unreadable(path: Path, error: Exception) -> DataError:
    """Return the error of a look-up file that cannot be read."""
    return DataError(
        f"the look-up file {path} cannot be read as text ({brief(error)}); name UTF-8 text files."
    )


def token_budget(max_tokens: int, prompt_tokens: int, context_length: int | None) -> int:
    """Return how many tokens may be generated within the model's context; -1 for any number.

    Raises:
        OptionError: none, because the prompt fills the context, or max_tokens makes no sense.
    """
    sentence = "max_tokens must be at least 1, or -1 for no limit of its own"
    max_tokens = whole(max_tokens, -1, None, sentence)
    if max_tokens == 0:
        raise OptionError(f"{sentence}, got 0.")
    if context_length is None:
        return max_tokens
    left = context_length - prompt_tokens
    if left < 1:
        raise OptionError(
            f"the prompt has {prompt_tokens} tokens, but the model's context holds "
            f"{context_length}, answer included; shorten the prompt."
        )
    if max_tokens > left:
        log.warning(
            "note: at most %d more tokens fit into the model's context of %d, fewer than the %d "
            "asked for.",
            left,
            context_length,
            max_tokens,
        )
    return left if max_tokens == -1 else min(max_tokens, left)
