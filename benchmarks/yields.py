"""Studies of what a step gives: tokens per pass of real streams as tree, γ and context grow.

Prompts are the built-in ones. For a long context, a prompt comes after as many of the other texts
as it takes, so that it reads like a long conversation's last message.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mlx_specstream.bench.cases import BUILT_IN, chosen_cases, read_cases
from mlx_specstream.bench.measure import in_turns, ours
from mlx_specstream.config import DecodeConfig, TreeSpec
from mlx_specstream.prompts import Prompt, encode_prompt

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_specstream.loading.load import StreamModel

ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64)
CONTEXTS = (256, 1024, 2048, 4096, 7936)


def yield_points(
    name: str,
    model: StreamModel,
    tokenizer: TokenizerWrapper,
    num_prompts: int,
    max_tokens: int,
    small: bool,
) -> Iterator[dict[str, Any]]:
    """Measure tokens per pass: `yield-tree` against rows and γ, `yield-context` against context."""
    assert model.streams is not None
    cases = chosen_cases([BUILT_IN], (), 1)[:num_prompts]
    prompts = [encode_prompt(tokenizer, case.prompt) for case in cases]
    gamma = model.streams.num_streams
    if name == "yield-tree":
        depths = range(1, gamma + 1)
        settings = [
            ("best-first", n, TreeSpec("best", rows=n)) for n in (ROWS[:3] if small else ROWS)
        ]
        settings += [
            (f"16 rows, γ used {d}", 16, TreeSpec("best", rows=16, depth=d)) for d in depths
        ]
        settings += [("chain", d + 1, TreeSpec("chain", branching=1, depth=d)) for d in depths]
        for series, rows, tree in settings:
            found = _tokens_per_pass(model, tokenizer, prompts, max_tokens, DecodeConfig(tree))
            yield {
                "x": rows,
                "series": series,
                "tokens_per_pass": found,
                "depth": tree.depth or gamma,
            }
        return
    limit = model.context_length or 1 << 20
    for context in (64, 128) if small else CONTEXTS:
        if context + max_tokens > limit:
            yield {"x": context, "series": "all", "left_out": True}
            continue
        long = [_lengthened(tokenizer, case.prompt, context) for case in cases]
        for text in ("chain", "16"):
            config = DecodeConfig(TreeSpec.parse(text))
            found = _tokens_per_pass(model, tokenizer, long, max_tokens, config)
            yield {"x": context, "series": f"tree {text}", "tokens_per_pass": found}


def _tokens_per_pass(
    model: StreamModel,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[list[int]],
    max_tokens: int,
    config: DecodeConfig,
) -> float:
    """Return the tokens that a pass yields, over all prompts."""
    timed = [ours(model, tokenizer, ids, max_tokens, config) for ids in prompts]
    in_turns(timed, 0)
    answers = [one.answered for one in timed]
    return sum(len(one.tokens) for one in answers) / sum(one.passes for one in answers)


def _lengthened(tokenizer: TokenizerWrapper, prompt: Prompt, tokens: int) -> list[int]:
    """Return a prompt's ids behind other texts, about `tokens` of them in all."""
    texts = itertools.cycle(case.prompt.messages[-1]["content"] for case in read_cases(BUILT_IN))
    own = prompt.messages[-1]["content"]
    before: list[str] = []
    while len(encode_prompt(tokenizer, Prompt.user("\n\n".join([*before, own])))) < tokens:
        # Some at a time: encoding all of it for every text would take longer than decoding.
        before += [next(texts) for _ in range(1 + tokens // 1024)]
    return encode_prompt(tokenizer, Prompt.user("\n\n".join([*before, own])))[-tokens:]
