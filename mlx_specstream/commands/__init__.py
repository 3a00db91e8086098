"""The verbs of `specstream`, one file each; `convert`, `chat` and `serve` are in folders of their own.

| file | the idea it holds |
|---|---|
| `generate.py` | answer one prompt, streaming the text |
| `verify.py` | compare plain and speculative answers, token for token |
| `bench.py` | measure what speculation gains here, beside mlx-lm |
| `plan.py` | show what steps cost here and which tree pays |
| `doctor.py` | say what runs here, and what to change |
| `demo.py` | answer a few prompts both ways with the demo model |
| `adopt.py` | make streams for a user's own model, in one command |
| `adoption/` | the stages of it |
| `find.py` | list streams on the hub that fit a model |
| `upload.py` | share streams on the hub |
| `distill.py` | write a model's own answers, to train on |
| `train.py` | train streams for a model on data |
| `cache_prompt.py` | run a long prompt once, keep its cache |
| `words.py` | verbs and flags that do not exist: what was meant, and what mlx-lm's are called here |
"""
