"""mlx-lm's decoder as rows: any position, any mask, any cache.

| file | the idea it holds |
|---|---|
| `backbone.py` | a decoder of mlx-lm in which every row has its own position and sees what a mask says |
| `attention.py` | attention in pieces that Metal's fused kernels take |
| `families/` | how a model of any family is taken apart by watching it run |
| `cache/` | KV caches whose passes write more rows than they keep |
| `masks.py` | who sees whom in one pass |
| `prefill.py` | the prompt enters the cache in chunks |
| `stages.py` | layers divided among processes |
| `probe.py` | the view is compared with mlx-lm on a few tokens before it is used |
"""
