"""The exact distribution of mlx-lm's samplers, and a chi-square test, in NumPy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np


def distribution(
    logits: np.ndarray,
    temperature: float,
    top_p: float = 0.0,
    top_k: int = 0,
    xtc: tuple[float, float] = (0.0, 0.1),
) -> np.ndarray:
    """Return the probabilities (V,) a sampler draws with.

    Top-p, XTC, top-k, temperature, in this order; `xtc` is its probability and threshold.
    """
    chance, threshold = xtc
    if chance:
        plain = distribution(logits, temperature, top_p, top_k)
        after = distribution(logits, 1.0, top_p)
        over = np.flatnonzero(after > threshold)
        cut = np.array(logits, dtype=np.float64)
        if len(over):
            cut[over[after[over] > after[over].min()]] = -np.inf
        # The filters before XTC have seen the uncut row.
        cut[after == 0] = -np.inf
        return (1 - chance) * plain + chance * distribution(cut, temperature, 0, top_k)
    logits = np.array(logits, dtype=np.float64)
    log_probs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    order = np.argsort(-log_probs)
    keep = np.ones(len(order), dtype=bool)
    if 0 < top_p < 1:
        above = 0.0
        for token in order:
            keep[token] = above < top_p
            above += math.exp(log_probs[token])
    if top_k > 0:
        keep[order[top_k:]] = False
    weights = np.where(keep, np.exp(log_probs / temperature), 0.0)
    return weights / weights.sum()


def chi_square_p(
    counts: Mapping[Sequence[int], int], expected: Mapping[Sequence[int], float]
) -> float:
    """Return the p-value of `counts` under `expected` probabilities, which add up to one.

    Cells of fewer than 5 expected draws are merged. A draw that cannot be is a p-value of 0.
    """
    draws = sum(counts.values())
    assert abs(sum(expected.values()) - 1) < 1e-4, sum(expected.values())
    if any(expected.get(cell, 0.0) == 0.0 for cell in counts):
        return 0.0
    cells: list[tuple[float, float]] = []
    rest_count, rest_expected = 0.0, 0.0
    for cell, probability in expected.items():
        if probability * draws >= 5:
            cells.append((counts.get(cell, 0), probability * draws))
        else:
            rest_count += counts.get(cell, 0)
            rest_expected += probability * draws
    if rest_expected >= 5 or rest_count > 0:
        cells.append((rest_count, max(rest_expected, 1.0)))
    statistic = sum((count - wanted) ** 2 / wanted for count, wanted in cells)
    freedom = len(cells) - 1
    if freedom == 0:
        return 1.0
    # Wilson and Hilferty: the cube root of chi-square / k is nearly normal.
    scaled = (statistic / freedom) ** (1 / 3)
    z = (scaled - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))
