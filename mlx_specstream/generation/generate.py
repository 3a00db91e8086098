"""Text in, text out: `generate` and `stream_generate`, drop-in for mlx-lm's.

    prompt ids ──► prefill ──► step ──► tokens of the accepted path ──► text, one response a token
                                ▲                    │
                                └── next step ◄── continue? (end of turn, stop string, budget)

Whether another step is wanted is decided before it is scheduled; the text is handed out while
the device computes it. `arguments.py` reads what the caller gives, `run.py` runs the loop,
`response.py` is what comes out of it.

The module is not named `generate`, because `mlx_specstream.generate` is the function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.nn as nn

from ..config import CacheConfig, DecodeConfig, parse_drafts
from ..config.bounds import whole
from ..loading.drafter import drafter_of_model
from ..loading.load import StreamModel
from ..model.cache import KVCache
from ..model.prefill import PREFILL_CHUNK, ChunkSize, PacedChunks
from ..planner.adaptive import AutoDecoder, Governor
from ..planner.costs import planner_for
from ..planner.lookup import looks_up, lookup_planner
from ..planner.trial import drafter_trial
from ..speculation.decode import Decoder
from ..speculation.drafters import NoDrafter
from ..speculation.drafters.lookup import FileIndex, LookUp
from ..speculation.drafting import DraftDecoder, StreamDecoder, drafter_decoder
from ..speculation.plain import PlainDecoder, plain_decoder
from ..speculation.sampling import LogitsProcessor, Sampler, TokenSampler, TreeProcessor
from ..speculation.statistics import SpeculationStats
from .arguments import (
    Prompt,
    cache_for,
    file_index,
    needed_config,
    needed_processors,
    needed_sampler,
    needed_seed,
    prompt_ids,
    refuse_uncallable,
    refuse_unknown,
    token_budget,
    with_chain,
    wrapped_tokenizer,
)
from .response import GenerationResponse, summary
from .run import GenerationRun, Progress, claim, remember
from .text import TextAssembler, continues_text, detokenizer_for

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


def generate(
    model: StreamModel | nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    verbose: bool = False,
    **options: Any,
) -> str:
    """Return the whole answer to a prompt; `options` are those of `stream_generate`.

    `verbose` prints the text as it comes, then the figures.
    """
    if verbose:
        print("=" * 10)
    text, response = "", None
    for response in stream_generate(model, tokenizer, prompt, **options):
        if verbose:
            print(response.text, end="", flush=True)
        text += response.text
    if verbose:
        print()
        print("=" * 10)
        if response is None or not text:
            print("No text generated for this prompt")
        else:
            print(summary(response))
    return text


def stream_generate(
    model: StreamModel | nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    max_tokens: int = 256,
    *,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prompt_cache: KVCache | list[Any] | None = None,
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    prefill_step_size: ChunkSize = PREFILL_CHUNK,
    prompt_progress_callback: Progress | None = None,
    config: DecodeConfig | None = None,
    drafts: str | None = None,
    lookup_files: Sequence[str | Path] = (),
    speculative: bool = True,
    stop: str | Sequence[str] = (),
    continues: bool | None = None,
    keep_drafts: bool = False,
    seed: int | None = None,
    draft_model: StreamModel | nn.Module | None = None,
    num_draft_tokens: int | None = None,
    **mlx_lm_options: Any,
) -> Iterator[GenerationResponse]:
    """Generate an answer token by token.

    Args:
        model: what `load` returns, or a bare mlx-lm model, which is decoded plainly.
        prompt: a text, or token ids.
        max_tokens: the most tokens to generate; -1 for as many as the model's context holds.
        sampler: log-probabilities (n, V) to tokens (n,), as mlx-lm's `make_sampler` makes them;
            None takes the most likely token.
        logits_processors: as in mlx-lm; every draft token gets its own history. Also a
            grammar's (`grammar.py`), for answers that fit a JSON schema.
        prompt_cache: what earlier text left: a `KVCache`, or a list of mlx-lm's. It is updated.
        max_kv_size: how many rows a new cache holds where the model has no sliding window (the
            first four always among them); also for models that mlx-lm ignores it for.
        kv_bits, kv_group_size, quantized_kv_start: store rows in a few bits, from so many on.
        config: how to decode; None for the tree that pays here, plain decoding included.
        drafts: where drafts come from, in place of what `config` says: `streams,lookup` (which
            `lookup` alone works for any model), `streams`, `lookup` or `none`.
        lookup_files: text files that the answer may quote, to be looked up in beside the text.
        speculative: False decodes one token per pass, with the same result.
        stop: a string or several that end the answer and are not part of it.
        prefill_step_size: prompt tokens per pass, or `PacedChunks` for a prompt someone waits for.
        continues: the answer goes on with the prompt's text and keeps the blank it may begin
            with; None: where the prompt is a text that does not end with a control token.
        seed: of this answer's random numbers; None takes one from MLX's global generator, so
            that `mx.random.seed` before the call repeats the answer. The same seed gives the
            same text with any tree and without speculation.
        keep_drafts: put every verified tree into its tokens' responses.
        draft_model: a loaded model of the same vocabulary, as in mlx-lm, that drafts in place of
            streams; better `load(..., draft_model=NAME)`, which compares the tokenizers.
        num_draft_tokens: draft a chain of so many tokens, in place of the config's tree.

    Raises:
        OptionError: an argument that cannot be used. Raised by the call, before the first token.
        ModelError: the model computes NaN.
    """
    refuse_unknown(mlx_lm_options)
    if not isinstance(model, StreamModel):
        model = StreamModel.plain(model)
    if draft_model is not None:
        drafting = draft_model.model if isinstance(draft_model, StreamModel) else draft_model
        drafter = drafter_of_model("given", drafting, model.backbone)
        model = replace(model, streams=None, drafter=drafter)
    if num_draft_tokens is not None:
        config = with_chain(config, num_draft_tokens)
    tokenizer = wrapped_tokenizer(tokenizer)
    ids = prompt_ids(tokenizer, prompt, model.backbone.vocab_size)
    caching = CacheConfig(max_kv_size, kv_bits, kv_group_size, quantized_kv_start)
    claim(prompt_cache)
    cache = cache_for(model, prompt_cache, caching)
    max_tokens = token_budget(max_tokens, cache.length + len(ids), model.context_length)
    if not isinstance(prefill_step_size, PacedChunks):
        sentence = "prefill_step_size must be at least 1"
        prefill_step_size = whole(prefill_step_size, 1, None, sentence)
    if prompt_progress_callback is not None:
        refuse_uncallable("prompt_progress_callback", prompt_progress_callback)
    token_sampler = TokenSampler(
        needed_sampler(sampler),
        needed_processors(logits_processors),
        list(ids),
        seed=needed_seed(seed),
        before=cache.length,
    )
    for process in token_sampler.processors:
        if isinstance(process, TreeProcessor):
            process.begin(len(ids))
    config = needed_config(config)
    if drafts is not None:
        config = replace(config or DecodeConfig(), drafts=parse_drafts(drafts))
    files = None
    if lookup_files:
        files = file_index(tokenizer, lookup_files, model.backbone.vocab_size)
    decoder = decoder_for(model, config, token_sampler, speculative, files=files)
    if not isinstance(decoder, PlainDecoder):
        decoder.keep_drafts = keep_drafts
    if continues is None:
        continues = continues_text(tokenizer, prompt, ids)
    detokenizer = detokenizer_for(tokenizer, continues=continues)
    run = GenerationRun(
        TextAssembler(detokenizer, tokenizer.eos_token_ids, stop, max_tokens),
        prompt=ids,
        cache=cache,
        token_sampler=token_sampler,
        stats=SpeculationStats(lossy=token_sampler.typical is not None),
    )
    lent = None if isinstance(prompt_cache, KVCache) else prompt_cache
    progress = prompt_progress_callback or (lambda _, __: None)
    answer = run.responses(decoder, model.model, lent, prefill_step_size, progress)
    remember(prompt_cache, answer)
    return answer


def decoder_for(
    model: StreamModel,
    config: DecodeConfig | None,
    token_sampler: TokenSampler,
    speculative: bool,
    *,
    files: FileIndex | None = None,
    text: Sequence[int] = (),
) -> Decoder:
    """Return the loop over token ids that generates with these settings.

    With the tree `auto` the first call may take some seconds, to measure what steps cost here; what
    other drafters than streams cost is found out while they draft.

    Args:
        files: what else to look up in. text: what precedes the answer, if more is known of it than
            the prompt that the loop will be given.

    Raises:
        OptionError: look-up alone was asked for where it cannot be.
    """
    backbone, config = model.backbone, config or DecodeConfig()
    streams = model.streams if speculative and config.uses_streams else None
    lookup = None
    if speculative and looks_up(model, config):
        lookup = LookUp.of(backbone, files, text)
    drafting: DraftDecoder | None = None
    governor: Governor | None = None
    if model.drafter is not None and speculative and config.uses_streams:
        streams = None
        drafting = drafter_decoder(model.drafter, config, token_sampler, lookup=lookup)
        governor = drafter_trial(model, drafting.tree, config)
        if governor is None:
            return drafting
    elif streams is not None:
        governor = planner_for(model, config)
    elif lookup is None:
        return plain_decoder(backbone, model.streams, token_sampler)
    if governor is not None or (streams is None and config.tree.kind == "auto"):
        lookups = None if lookup is None else lookup_planner(model)
        return AutoDecoder(
            streams, config, token_sampler, governor, False, lookup, lookups, backbone, drafting
        )
    if streams is not None:
        return StreamDecoder(streams, config, token_sampler, lookup=lookup)
    token_sampler.typical = config.typical
    return DraftDecoder(NoDrafter(backbone), config.tree, token_sampler, lookup=lookup)
