"""Where code written for mlx-lm looks for prompt caches; this package's own model code is in `model`.

| file | the idea it holds |
|---|---|
| `cache.py` | mlx-lm's prompt caches, made for what `load` returns |
"""
