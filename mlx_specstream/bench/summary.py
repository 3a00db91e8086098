"""What the runs of a benchmark come to: per category and method, medians and spread.

Repeats of a prompt count as one, by their median. A speed-up is a prompt's seconds per token with
mlx-lm over those with the method, so prompts count alike; the overall ratio weighs them by tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .methods import MLX_LM
from .result import AskedPrompt, MethodRun, Result

ALL = "all"


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, statistics.median(values), high)


@dataclass(frozen=True)
class Line:
    """One method in one category.

    prompts: that were asked, turns counted; judged: their runs. tokens_s: tokens per second of
    decoding. speedup: per prompt, over mlx-lm; overall: of all tokens together. prefill_s: to the
    first token. step_s: seconds per pass. accepted: entry d is the share of drafting passes in
    which at least d + 1 drafts were accepted.
    """

    category: str
    method: str
    prompts: int
    tokens: int
    tokens_s: float
    speedup: Spread
    overall: float
    first_token_s: float
    prefill_tokens_s: float
    tokens_per_step: float
    step_s: float
    accepted: tuple[float, ...]
    acceptance: float
    peak_bytes: int
    runs: int
    identical: int
    near_ties: int
    different: int


def summarised(result: Result) -> list[Line]:
    """Return a line per category and method, categories in order of appearance, then all."""
    categories = list(dict.fromkeys(asked.category for asked in result.asked))
    lines = []
    for category in [*categories, ALL] if len(categories) > 1 else categories:
        chosen = [asked for asked in result.asked if category in (ALL, asked.category)]
        for method in result.named_methods:
            line = _line(category, method, chosen)
            if line is not None:
                lines.append(line)
    return lines


def _line(category: str, method: str, asked: Sequence[AskedPrompt]) -> Line | None:
    runs = [run for one in asked for run in one.runs if run.method == method]
    ratios, seconds, base_seconds, timed = [], 0.0, 0.0, 0
    for one in asked:
        own, base = _token_s(one.runs, method), _token_s(one.runs, MLX_LM.label)
        if own is None or base is None:
            continue
        count = next(run.tokens for run in one.runs if run.method == method) - 1
        ratios.append(base / own)
        seconds += own * count
        base_seconds += base * count
        timed += count
    if not runs or not ratios:
        return None
    passes = sum(run.passes for run in runs)
    decoding = sum(run.decode_s for run in runs)
    by_accepted = _added(run.by_accepted for run in runs)
    drafting = sum(by_accepted)
    at_least = [sum(by_accepted[depth:]) for depth in range(1, len(by_accepted))]
    drafted = sum(run.drafted for run in runs)
    prefill = [
        (run.prefill_s, one.prompt_tokens)
        for one in asked
        for run in one.runs
        if run.method == method
    ]
    verdicts = [run.verdict for run in runs]
    return Line(
        category=category,
        method=method,
        prompts=len(ratios),
        tokens=timed,
        tokens_s=timed / seconds,
        speedup=Spread.of(ratios),
        overall=base_seconds / seconds,
        first_token_s=statistics.median(s for s, _ in prefill),
        prefill_tokens_s=sum(n for _, n in prefill) / sum(s for s, _ in prefill),
        tokens_per_step=sum(run.tokens for run in runs) / passes,
        # The first pass of an answer is timed as prefill.
        step_s=decoding / max(1, passes - len(runs)),
        accepted=tuple(count / drafting for count in at_least) if drafting else (),
        acceptance=sum(depth * count for depth, count in enumerate(by_accepted)) / drafted
        if drafted
        else 0.0,
        peak_bytes=max(run.peak_bytes for run in runs),
        runs=len(runs),
        identical=verdicts.count("identical"),
        near_ties=verdicts.count("near-tie"),
        different=verdicts.count("different"),
    )


def _token_s(runs: Iterable[MethodRun], method: str) -> float | None:
    """Return the median seconds per token of a method's repeats."""
    values = [run.token_s for run in runs if run.method == method]
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _added(histograms: Iterable[Sequence[int]]) -> list[int]:
    total: list[int] = []
    for histogram in histograms:
        total += [0] * (len(histogram) - len(total))
        for index, count in enumerate(histogram):
            total[index] += count
    return total
