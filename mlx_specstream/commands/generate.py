"""`specstream generate`: one prompt, one answer, streamed. Flags that mlx-lm has keep its names."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from ..errors import DataError, OptionError
from ..generation.decode_options import (
    LOSSY_NOTE,
    add_cache_options,
    add_decode_options,
    add_model_options,
    cache_config,
    decode_config,
    described,
    load_options,
)
from ..generation.sampling_options import (
    add_grammar_options,
    add_sampling_options,
    make_grammar_processors,
    sampling_config,
)
from ..machine import ranks
from ..prompts.encode import template_args
from ..weights.files import without_folders

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..config import CacheConfig
    from ..generation.response import GenerationResponse
    from ..loading.load import StreamModel
    from ..model.cache import KVCache
    from ..model.prefill import ChunkSize

log = logging.getLogger("mlx_specstream")

DEFAULT_MAX_TOKENS = 256
_NOT_YET = ("--image",)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `specstream generate`."""
    parser = argparse.ArgumentParser(
        prog="specstream generate",
        description="Answer one prompt, streaming the text, in fewer passes of the model.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--prompt", "-p", required=True, help="what to answer; '-' reads it from standard input"
    )
    parser.add_argument("--system-prompt", help="system prompt for the chat template")
    parser.add_argument("--prefill-response", help="how the answer begins")
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        help="most tokens to generate, -1 for no limit (default: %(default)s)",
    )
    parser.add_argument("--stop", nargs="+", default=[], help="strings that end the answer")
    parser.add_argument(
        "--extra-eos-token", nargs="+", default=[], help="further tokens that end the answer"
    )
    add_sampling_options(parser)
    add_grammar_options(parser)
    parser.add_argument(
        "--ignore-chat-template", action="store_true", help="take the prompt as it is"
    )
    parser.add_argument(
        "--chat-template-config", help="JSON object with further arguments of the chat template"
    )
    parser.add_argument(
        "--prefill-step-size",
        type=int,
        help=(
            "prompt tokens per pass; fewer take less memory (default: 2048, and at a "
            "terminal no more than take a moment, so that Ctrl-C is heard)"
        ),
    )
    parser.add_argument(
        "--prompt-cache-file",
        help="go on from this prompt cache, made by specstream or mlx_lm cache_prompt",
    )
    add_cache_options(parser)
    add_decode_options(parser, lossy=True)
    parser.add_argument(
        "--lookup-files",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text files that the answer may quote, to look drafts up in beside the text itself",
    )
    parser.add_argument(
        "--no-speculation", action="store_true", help="decode plainly, one token per pass"
    )
    parser.add_argument(
        "--verbose",
        type=_as_bool,
        default=True,
        metavar="{T,F}",
        help="T: text and figures, F: the text alone (default: T)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object with text, tokens and figures"
    )
    for flag in _NOT_YET:
        parser.add_argument(flag, nargs="*", action=_Refuse, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str]) -> int:
    """Answer the prompt and print it."""
    arguments = build_parser().parse_args(argv)
    text = prompt_text(arguments.prompt)
    config, caching = decode_config(arguments), cache_config(arguments)
    sampling = sampling_config(arguments)
    template_options = template_args(arguments.chat_template_config, "--chat-template-config")

    import mlx.core as mx

    from ..generation.generate import stream_generate
    from ..generation.prompt_progress import PromptProgress
    from ..loading.load import load
    from ..prompts import Prompt, encode_prompt

    if arguments.seed is not None:
        mx.random.seed(arguments.seed)
    model, tokenizer = load(arguments.model, **load_options(arguments))
    for token in arguments.extra_eos_token:
        add_eos_token(tokenizer, token)
    prompt = encode_prompt(
        tokenizer,
        Prompt.user(text, arguments.system_prompt),
        response=arguments.prefill_response,
        use_template=not arguments.ignore_chat_template,
        template_options=template_options,
        behind_cache=arguments.prompt_cache_file is not None,
    )
    vocab_size = model.backbone.vocab_size
    reading, cache = PromptProgress(sys.stderr), None
    if arguments.prompt_cache_file is not None:
        cache = _stored_cache(arguments.prompt_cache_file, arguments.model, model, caching)
    responses = stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=arguments.max_tokens,
        sampler=sampling.sampler(vocab_size, tokenizer),
        logits_processors=[
            *sampling.processors(vocab_size),
            *make_grammar_processors(arguments, tokenizer, vocab_size),
        ],
        config=config,
        lookup_files=arguments.lookup_files,
        speculative=not arguments.no_speculation,
        stop=arguments.stop,
        continues=(
            arguments.ignore_chat_template
            or arguments.prefill_response is not None
            or not tokenizer.has_chat_template
        ),
        prompt_cache=cache,
        max_kv_size=caching.max_kv_size,
        kv_bits=caching.kv_bits,
        kv_group_size=caching.kv_group_size,
        quantized_kv_start=caching.quantized_kv_start,
        prefill_step_size=_chunks(arguments.prefill_step_size),
        prompt_progress_callback=reading,
    )
    if config.lossy:
        log.warning("note: %s", LOSSY_NOTE)
    shown = arguments.verbose and not arguments.json
    if shown:
        print("=" * 10)
    pieces, tokens, last = [], [], None
    try:
        for last in responses:
            pieces.append(last.text)
            tokens.append(last.token)
            if not arguments.json:
                print(last.text, end="", flush=True)
    finally:
        reading.clear()
        if not arguments.json:
            print(flush=True)  # also before an error or "interrupted"
    assert last is not None  # max_tokens is at least 1
    if arguments.json:
        record = _record(model, "".join(pieces), tokens, last)
        print(json.dumps({**record, "config": described(config)}, ensure_ascii=False))
        return 0
    if shown:
        from ..generation.response import summary

        print("=" * 10)
        print(summary(last))
    return 0


def add_eos_token(tokenizer: TokenizerWrapper, token: str) -> None:
    """Let one more token, given as text or id, end the answer.

    Raises:
        OptionError: the tokenizer has no such token.
    """
    if not token.isdecimal() and token not in tokenizer.get_vocab():
        raise OptionError(
            f"the model's tokenizer has no single token {token!r} to end answers with; use --stop "
            "for a string."
        )
    tokenizer.add_eos_token(token)


def _stored_cache(path: str, name: str, model: StreamModel, config: CacheConfig) -> KVCache:
    """Return the rows of a prompt cache made with this model.

    Raises:
        SpecStreamError: the file cannot be used.
    """
    from ..loading.folders import model_folder
    from ..model.cache.files import check_model, load_prompt_cache
    from ..model.cache.kinds import quantization

    if ranks.group() is not None and model.backbone.stages.group is None:
        raise OptionError(
            "a prompt cache holds all heads, of which every process here has a part; leave out "
            "--prompt-cache-file, or divide the model by layers with --pipeline."
        )
    cache, metadata = load_prompt_cache(path, model.backbone.windows, quantization(config))
    check_model(metadata, [name, str(model_folder(name))], path)
    return cache


def _record(
    model: StreamModel, text: str, tokens: Sequence[int], last: GenerationResponse
) -> dict[str, object]:
    """Return what --json prints, without the config."""
    return {
        "text": text,
        "tokens": list(tokens),
        "finish_reason": last.finish_reason,
        "prompt_tokens": last.prompt_tokens,
        "prompt_tps": _rounded(last.prompt_rate),
        "generation_tokens": last.generation_tokens,
        "generation_tps": _rounded(last.generation_rate),
        "peak_memory": round(last.peak_memory, 3),
        "model": without_folders(model.name),
        "streams": without_folders(model.streams_name) or None,
        "speculation": last.stats.to_dict(),
    }


def _rounded(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 3)


def _chunks(wanted: int | None) -> ChunkSize:
    """Return the prompt tokens per pass: as asked for, or paced if a person waits."""
    from ..model.prefill import PREFILL_CHUNK, PacedChunks

    if wanted is not None:
        return wanted
    # By the clock, which differs between processes that must run the same passes.
    paced = sys.stdout.isatty() and not ranks.is_launched()
    return PacedChunks(PREFILL_CHUNK) if paced else PREFILL_CHUNK


def prompt_text(option: str) -> str:
    """Return the prompt, from standard input for "-"; escaped newlines and tabs as in mlx-lm."""
    if option == "-":
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError:
            raise DataError("the prompt on standard input is not UTF-8 text.") from None
    else:
        text = option.replace("\\n", "\n").replace("\\t", "\t")
    if not text.strip():
        raise DataError("the prompt is empty; say what the model is to answer with --prompt.")
    return text


def _as_bool(text: str) -> bool:
    """Read mlx-lm's T and F."""
    return text.lower() not in ("false", "f")


class _Refuse(argparse.Action):
    """A flag of mlx-lm that is not supported: better said than ignored."""

    def __call__(self, *_: object, **__: object) -> NoReturn:
        raise OptionError(
            f"{self.option_strings[0]} of mlx-lm is not supported yet; leave it out, or use "
            "mlx-lm itself for this."
        )
