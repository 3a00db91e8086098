"""The command-line options that say how tokens are drawn: mlx-lm's samplers and processors.

Shared by every verb that generates. Flags that mlx-lm's command line has keep its names, the
others those of its `make_logits_processors`.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import SamplingConfig
from ..config.sampling import PENALTY_CONTEXT
from ..errors import DataError, OptionError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..speculation.sampling import LogitsProcessor

_CONTEXTS = ("repetition_context_size", "presence_context_size", "frequency_context_size")


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
        help="how many tokens back the penalties look, 0 for all (default: %(default)s)",
    )
    add("--logit-bias", metavar="JSON", help="add to tokens' logits: '{\"TOKEN_ID\": BIAS}'")


def add_grammar_options(parser: argparse.ArgumentParser) -> None:
    """Add --json-schema, --regex and --grammar, of which one may be given."""
    group = parser.add_argument_group("constrained answers", 'need "mlx-specstream[grammar]"')
    one = group.add_mutually_exclusive_group()
    one.add_argument("--json-schema", metavar="FILE", help="the answer is JSON that fits a schema")
    one.add_argument("--regex", metavar="PATTERN", help="the answer matches a regular expression")
    one.add_argument("--grammar", metavar="FILE", help="the answer fits a grammar in Lark's form")


def sampling_config(arguments: argparse.Namespace) -> SamplingConfig:
    """Return the config that the flags describe; not every verb has every flag.

    Raises:
        OptionError: a flag is out of range, or the logit bias cannot be read.
    """
    given = {
        field.name: value
        for field in fields(SamplingConfig)
        if (value := getattr(arguments, field.name, None)) is not None
    }
    if (size := getattr(arguments, "penalty_context_size", None)) is not None:
        given |= dict.fromkeys(_CONTEXTS, size)
    given["logit_bias"] = read_logit_bias(getattr(arguments, "logit_bias", None))
    try:
        return SamplingConfig(**given)
    except OptionError as error:
        text = str(error).replace("repetition-context-size", "penalty-context-size")
        raise OptionError(f"--{text}") from None


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


def read_logit_bias(text: str | None) -> dict[int, float]:
    """Read `{"TOKEN_ID": BIAS}`.

    Raises:
        OptionError: it has another form.
    """
    if text is None:
        return {}
    wrong = f"--logit-bias must be a JSON object like '{{\"42\": -5.0}}', got {text!r}."
    try:
        values: Any = json.loads(text)
        biases = {int(token): float(bias) for token, bias in values.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise OptionError(wrong) from None
    if any(math.isnan(bias) for bias in biases.values()):
        raise OptionError(wrong)
    return biases


def _read(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{name} cannot be read ({reason}); name a text file.") from None
