"""What rivals take: a step in plain tokens, and whole answers beside mlx-lm's, all in turns.

Both need a machine that does nothing else. A plain token is one of mlx-lm's own decoding.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.rivals_field import TREES, Rival
from benchmarks.rivals_results import Results, comparable, conditions, tokens_per_pass
from mlx_specstream.bench.cases import Case
from mlx_specstream.bench.measure import Answered, TimedAnswer, in_turns, mlx_lms, ours
from mlx_specstream.errors import OptionError
from mlx_specstream.loading.load import StreamModel
from mlx_specstream.prompts import encode_prompt

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

TURN = 8  # tokens of an answer before the next has its turn
COST_TOKENS = 32  # of an answer where steps are timed
BEST = 5
MLX_LM = "mlx-lm"
Setting = tuple[str, str]  # a rival's name and a tree


def _timed(
    base: StreamModel,
    tokenizer: TokenizerWrapper,
    cases: Sequence[Case],
    settings: Sequence[tuple[Rival, str]],
    max_tokens: int,
    limit_s: float,
    note: Callable[[Case, Answered, dict[Setting, Answered]], None],
) -> int:
    """Answer prompts with mlx-lm and all settings in turns, as many as `limit_s` allows; return how many.

    The first answers, which warm up, are not noted. note: told of mlx-lm's answer and the others'.
    """
    begun, longest = time.perf_counter(), 0.0
    for place, case in enumerate([cases[0], *cases]):
        started = time.perf_counter()
        if place > 1 and started - begun + longest > limit_s:
            return place - 1
        ids = encode_prompt(tokenizer, case.prompt)
        tokens = max_tokens if place else TURN
        turns: list[tuple[Setting, TimedAnswer]] = [
            ((rival.name, tree), ours(rival.model, tokenizer, ids, tokens, rival.config(tree)))
            for rival, tree in settings
        ]
        turns.append(((MLX_LM, ""), mlx_lms(base.model, tokenizer, ids, tokens)))
        first = place % len(turns)
        turns = turns[first:] + turns[:first]
        in_turns([answer for _, answer in turns], TURN)
        answers = {setting: answer.answered for setting, answer in turns}
        plain = answers.pop((MLX_LM, ""))
        if place:
            note(case, plain, answers)
            longest = max(longest, time.perf_counter() - started)
    return len(cases)


def token_s(answered: Answered) -> float | None:
    """Return the seconds of a token after the first, None of an answer too short to tell."""
    tokens = len(answered.tokens) - 1
    return answered.decode_s / tokens if tokens > 0 and answered.decode_s > 0 else None


def step_s(answered: Answered) -> float | None:
    """Return the seconds of a pass after the first."""
    passes = answered.passes - 1
    return answered.decode_s / passes if passes > 0 and answered.decode_s > 0 else None


def costs(
    results: Results,
    rivals: Sequence[Rival],
    base: StreamModel,
    tokenizer: TokenizerWrapper,
    cases: Sequence[Case],
    max_tokens: int,
    limit_s: float,
) -> None:
    """Measure what a step costs in plain tokens with every drafter and tree: the median of prompts."""
    ratios: dict[Setting, list[float]] = defaultdict(list)

    def note(case: Case, plain: Answered, answers: dict[Setting, Answered]) -> None:
        token = token_s(plain)
        for setting, answered in answers.items():
            step = step_s(answered)
            if token and step:
                ratios[setting].append(step / token)
        print(f"{case.category}: a plain token takes {1000 * (token or 0):.1f} ms", flush=True)

    settings = [(rival, tree) for rival in rivals for tree in TREES]
    tokens = min(max_tokens, COST_TOKENS)
    asked = _timed(base, tokenizer, cases, settings, tokens, limit_s, note)
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for rival, tree in settings:
        if several := ratios[rival.name, tree]:
            found[rival.name][tree] = round(statistics.median(several), 3)
    results.keep("cost", value={**conditions(), "prompts": asked, "steps": found})


def best(known: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Return (name, tree, speed-up) of each method's best tree, by tokens and cost, the best first.

    Raises:
        OptionError: tokens per pass or costs are not known yet.
    """
    found = []
    for name, trees in comparable(known).items():
        prices = known.get("cost", {}).get("steps", {}).get(name, {})
        speeds = [
            (rate / prices[tree], tree)
            for tree, cells in trees.items()
            if tree in prices and (rate := tokens_per_pass(cells))
        ]
        if speeds:
            speed, tree = max(speeds)
            found.append((name, tree, speed))
    if not found:
        raise OptionError("the five best are not known yet; run --count and --cost first.")
    return sorted(found, key=lambda one: -one[2])


def clock(
    results: Results,
    rivals: Sequence[Rival],
    base: StreamModel,
    tokenizer: TokenizerWrapper,
    cases: Sequence[Case],
    max_tokens: int,
    limit_s: float,
) -> None:
    """Measure the wall-clock of the five best methods with their best trees, against mlx-lm."""
    by_name = {rival.name: rival for rival in rivals}
    settings = [(by_name[name], tree) for name, tree, _ in best(results.read()) if name in by_name][
        :BEST
    ]
    seconds: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)
    differing = 0

    def note(case: Case, plain: Answered, answers: dict[Setting, Answered]) -> None:
        nonlocal differing
        for name, answered in [(MLX_LM, plain), *((n, a) for (n, _), a in answers.items())]:
            seconds[name] += answered.decode_s
            tokens[name] += len(answered.tokens) - 1
            differing += answered.tokens != plain.tokens
        print(f"{case.category}: asked", flush=True)

    asked = _timed(base, tokenizer, cases, settings, max_tokens, limit_s, note)
    found = {
        rival.name: {
            "tree": tree,
            "speedup": round(
                seconds[MLX_LM] / tokens[MLX_LM] * tokens[rival.name] / seconds[rival.name], 3
            ),
        }
        for rival, tree in settings
    }
    told = {**conditions(), "prompts": asked, "differing": differing}
    results.keep("clock", value={**told, "methods": found})
