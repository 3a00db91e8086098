"""A tiny random model of any family of mlx-lm, made by mlx-lm's own class.

| file | the idea it holds |
|---|---|
| `sizes.py` | one table of sizes for all families, by the names their configs use |
| `own.py` | the other words that some families need |
| `make.py` | the model of such a config, with seeded random weights |
"""

from tests.support.tiny_models.make import family_modules, randomize, tiny_config, tiny_random_model
from tests.support.tiny_models.own import VARIANTS
from tests.support.tiny_models.sizes import WINDOW

__all__ = ["VARIANTS", "WINDOW", "family_modules", "randomize", "tiny_config", "tiny_random_model"]
