"""Random cases of speculation against mlx-lm's own decoding, as many as one likes.

    python -m tests.support.exactness --cases 1000 --seed 0

A case is a tiny random model of mlx-lm's own class with random streams, a cache, a tree, a
sampler and a few turns of a conversation on one cache, some of which go back and change what was
said. Every answer must be what mlx-lm's `generate_step` gives, and every cache must hold the rows
that mlx-lm's holds; where rows do not depend on how a text was divided, those of a fresh start.

| file | the idea it holds |
|---|---|
| `draw.py` | what a case consists of, drawn from a seed and a number alone |
| `choices.py` | ways to draw tokens that plain decoding shares, seeded per position |
| `models.py` | the tiny models and their streams, in float32, 16 bits or few |
| `reference.py` | mlx-lm doing the same turns |
| `play.py` | the turns both ways |
| `together.py` | a turn in a batch, beside other requests |
| `compare.py` | what counts as the same: tokens, rows, near-ties |
| `tally.py` | what was found, by kind |
"""
