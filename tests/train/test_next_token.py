from __future__ import annotations

import numpy as np

from mlx_specstream.train.next_token import fit_next_token


def test_the_next_token_starts_as_the_best_map_of_its_rank() -> None:
    """Of what follows a rank-2 map of unit rows, with noise, nearly all is found; of chance nothing."""
    random = np.random.default_rng(0)
    rows = 3 * random.normal(size=(4000, 24))
    unit_rows = rows / np.sqrt(np.square(rows).mean(-1, keepdims=True))
    true = 5 * random.normal(size=(24, 2)) @ random.normal(size=(2, 24))
    wanted = unit_rows @ true
    steps = wanted + 0.3 * random.normal(size=(4000, 24))
    hidden = np.concatenate([np.zeros((1, 24)), np.cumsum(steps, axis=0)])
    found = fit_next_token(2, [(hidden[:2001], rows[:2000]), (hidden[2000:], rows[2000:])])
    assert found.share > 0.98
    error = unit_rows @ found.a @ found.b - wanted
    assert np.square(error).mean() < 0.01 * np.square(wanted).mean()
    assert 0.3 < (unit_rows @ found.a).var() < 0.37
    chance = np.cumsum(random.normal(size=(4001, 24)), axis=0)
    assert fit_next_token(2, [(chance, rows)]).share < 0.05
