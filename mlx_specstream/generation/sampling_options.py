"""The command-line options that say how tokens are drawn: mlx-lm's samplers and processors.

Shared by every verb that generates. Flags that mlx-lm's command line has keep its names, the
others those of its `make_logits_processors`.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, OptionError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..speculation.sampling import LogitsProcessor, Sampler

PENALTY_CONTEXT = 20  # mlx-lm's


def add_sampler_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags that also a server's requests have words for; return their group."""
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--temp", type=float, default=0.0, help="temperature; 0 takes the likeliest token")
    add("--top-p", type=float, default=1.0, help="nucleus sampling (1: off)")
    add("--min-p", type=float, default=0.0, help="min-p sampling (0: off)")
    add("--top-k", type=int, default=0, help="top-k sampling (0: off)")
    add("--seed", type=int, help="seed of the random generator")
    return group


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of mlx-lm's samplers and logits processors."""
    add = add_sampler_options(parser).add_argument
    add("--min-tokens-to-keep", type=int, default=1, help="tokens that min-p leaves at least")
    add("--xtc-probability", type=float, default=0.0, help="how often XTC is applied (0: off)")
    add(
        "--xtc-threshold",
        type=float,
        default=0.0,
        help="XTC cuts all tokens above this probability but the least likely of them",
    )
    group = parser.add_argument_group("logits processors")
    add = group.add_argument
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="divide the logits of tokens that have just occurred by this (1: off)",
    )
    add(
        "--presence-penalty",
        type=float,
        default=0.0,
        help="take this off the logits of tokens that have just occurred (0: off)",
    )
    add(
        "--frequency-penalty",
        type=float,
        default=0.0,
        help="take this off a token's logit for every time it has just occurred (0: off)",
    )
    add(
        "--penalty-context-size",
        type=int,
        default=PENALTY_CONTEXT,
        help="how many tokens back the penalties look (default: %(default)s)",
    )
    add("--logit-bias", metavar="JSON", help="add to tokens' logits: '{\"TOKEN_ID\": BIAS}'")


def add_grammar_options(parser: argparse.ArgumentParser) -> None:
    """Add --json-schema, --regex and --grammar, of which one may be given."""
    group = parser.add_argument_group("constrained answers", 'need "mlx-specstream[grammar]"')
    one = group.add_mutually_exclusive_group()
    one.add_argument("--json-schema", metavar="FILE", help="the answer is JSON that fits a schema")
    one.add_argument("--regex", metavar="PATTERN", help="the answer matches a regular expression")
    one.add_argument("--grammar", metavar="FILE", help="the answer fits a grammar in Lark's form")


def check_sampling(arguments: argparse.Namespace) -> None:
    """Refuse flags out of range before a model is loaded.

    Raises:
        OptionError: a flag is out of range.
    """
    number = math.isfinite
    checks = (
        ("temp", lambda x: 0 <= x < math.inf, "a number of at least 0"),
        ("top_p", lambda x: 0 <= x <= 1, "a probability"),
        ("min_p", lambda x: 0 <= x <= 1, "a probability"),
        ("top_k", lambda x: x >= 0, "at least 0 (0: off)"),
        ("min_tokens_to_keep", lambda x: x >= 1, "at least 1"),
        ("xtc_probability", lambda x: 0 <= x <= 1, "a probability"),
        ("xtc_threshold", lambda x: 0 <= x <= 0.5, "between 0 and 0.5"),
        ("repetition_penalty", lambda x: 0 < x < math.inf, "a number above 0 (1: off)"),
        ("presence_penalty", number, "a number (0: off)"),
        ("frequency_penalty", number, "a number (0: off)"),
        ("penalty_context_size", lambda x: x >= 1, "at least 1"),
    )
    for name, right, wanted in checks:
        value = getattr(arguments, name, None)  # not every verb has every flag
        if value is not None and not right(value):
            raise OptionError(f"--{name.replace('_', '-')} must be {wanted}, got {value}.")


def make_sampler(
    arguments: argparse.Namespace, vocab_size: int, tokenizer: TokenizerWrapper
) -> Sampler | None:
    """Return mlx-lm's sampler for the sampling flags, None for the likeliest token.

    Like mlx-lm's command line, XTC spares line breaks and the tokens that end an answer.

    Raises:
        OptionError: --top-k is not below the size of the vocabulary.
    """
    if arguments.temp == 0:
        return None
    if arguments.top_k >= vocab_size:
        raise OptionError(
            f"--top-k must be below the model's {vocab_size} tokens, got {arguments.top_k}."
        )
    from mlx_lm import sample_utils

    spared: list[int] = []
    if arguments.xtc_probability:
        spared = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]
    sampler: Sampler = sample_utils.make_sampler(
        arguments.temp,
        arguments.top_p,
        arguments.min_p,
        arguments.min_tokens_to_keep,
        top_k=arguments.top_k,
        xtc_probability=arguments.xtc_probability,
        xtc_threshold=arguments.xtc_threshold,
        xtc_special_tokens=spared,
    )
    return sampler


def make_processors(arguments: argparse.Namespace, vocab_size: int) -> list[LogitsProcessor]:
    """Return mlx-lm's logits processors for the flags.

    Raises:
        OptionError: the logit bias cannot be read, or names a token that is not there.
    """
    from mlx_lm import sample_utils

    size = arguments.penalty_context_size
    penalty = arguments.repetition_penalty
    processors: list[LogitsProcessor] = sample_utils.make_logits_processors(
        _logit_bias(arguments.logit_bias, vocab_size),
        None if penalty == 1 else penalty,
        size,
        arguments.presence_penalty,
        size,
        arguments.frequency_penalty,
        size,
    )
    return processors


def make_grammar_processors(
    arguments: argparse.Namespace, tokenizer: TokenizerWrapper, vocab_size: int
) -> list[LogitsProcessor]:
    """Return what keeps the answer to the schema, expression or grammar asked for, if any.

    Raises:
        DataError: it cannot be read or has a mistake.
        OptionError: llguidance is not installed.
    """
    from .grammar import Grammar

    if arguments.json_schema is not None:
        grammar = Grammar.json_schema(tokenizer, _read(arguments.json_schema), vocab_size)
    elif arguments.regex is not None:
        grammar = Grammar.regex(tokenizer, arguments.regex, vocab_size)
    elif arguments.grammar is not None:
        grammar = Grammar.lark(tokenizer, _read(arguments.grammar), vocab_size)
    else:
        return []
    return [grammar.processor()]


def _logit_bias(option: str | None, vocab_size: int) -> dict[int, float] | None:
    """Read `{"TOKEN_ID": BIAS}`."""
    if option is None:
        return None
    wrong = f"--logit-bias must be a JSON object like '{{\"42\": -5.0}}', got {option!r}."
    try:
        values: Any = json.loads(option)
        biases = {int(token): float(bias) for token, bias in values.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise OptionError(wrong) from None
    if any(math.isnan(bias) for bias in biases.values()):
        raise OptionError(wrong)
    for token in biases:
        if not 0 <= token < vocab_size:
            raise OptionError(
                f"--logit-bias names the token id {token}, but the model's ids are 0 to "
                f"{vocab_size - 1}."
            )
    return biases


def _read(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{name} cannot be read ({reason}); name a text file.") from None
