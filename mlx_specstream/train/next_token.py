"""Where a stream's knowledge of the next token starts: a linear guess at the hidden state that follows.

Streams of position t that know x_{t+1} would best start from M_{t+1}, the state that the base
computes once it has read that token. The part of it that is linear in the token is known before
any training: the rank-r map of ê that explains most of M_{t+1} − M_t (reduced-rank regression).
It enters at the scale of the hidden states, where a random map of that size would be noise to
trained streams and a smaller one would not be heard. Knows arrays, no framework: both trainers
start from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

NUM_TEXTS = 300
"""Training texts that the map is fitted to."""

_RIDGE = 1e-2  # added to the variance of ê's channels, which is near one


@dataclass(frozen=True)
class NextTokenMap:
    """ê @ a @ b is the map. a: (h, r), b: (r, h), float32. share: of the change it explains."""

    a: np.ndarray
    b: np.ndarray
    share: float


def fit_next_token(rank: int, texts: Iterable[tuple[np.ndarray, np.ndarray]]) -> NextTokenMap:
    """Return the best map of a rank.

    texts: of each text hidden states in a row (A, h), and the embedding rows (A − 1, h) of the
    tokens read after all but the last of them; at least two states in all.
    """
    moments, products, change, count = np.zeros(0), np.zeros(0), 0.0, 0
    for hidden, rows in texts:
        y = np.diff(hidden.astype(np.float32), axis=0)
        x = rows.astype(np.float32)
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
        moments = x.T @ x + (moments if count else 0)
        products = x.T @ y + (products if count else 0)
        change, count = change + float(np.square(y).sum()), count + len(x)
    whole = np.linalg.solve(moments + _RIDGE * count * np.eye(len(moments)), products)
    _, directions = np.linalg.eigh(whole.T @ moments @ whole)
    out = directions[:, -rank:]
    a = whole @ out
    fitted = a @ out.T
    left = change - float(2 * (fitted * products).sum() - (fitted * (moments @ fitted)).sum())
    # ê @ a gets the variance of a fresh map's, 1/3, so that both factors learn at usual rates.
    energy = np.maximum((a * (moments @ a)).sum(0), 0)  # rounding may leave it below
    size = np.maximum(np.sqrt(3 * energy / count), 1e-6)
    share = 1 - left / change if change else 0.0
    return NextTokenMap((a / size).astype(np.float32), (out * size).T.astype(np.float32), share)
