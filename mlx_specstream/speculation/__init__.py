"""The method, one file per section of the paper: verify the last draft and make the next in one pass.

| file | the idea it holds |
|---|---|
| `decode.py` | the speculative loop: prefill, then step after step |
| `drafting.py` | the decoders that draft every step, with streams or any other drafter |
| `step.py` | one step: verify, accept, draft, in one graph |
| `streams.py` | γ speculative streams in the upper layers [SS §3.1.1-2, Eq. 1-3, 9] |
| `sharded.py` | adapters on layers of which every process holds a part |
| `adapters.py` | LoRA on the rows of streams alone, in few kernels |
| `drafters/` | what proposes the tokens that a step verifies: streams, or others |
| `tree.py` | draft trees: which tokens a step verifies, and who descends from whom [SS §3.1.2, Eq. 4] |
| `prune.py` | early-exit pruning before the streams join [SS §3.1.3] |
| `accept.py` | acceptance by sample-and-match: exactly lossless for any tree (own) |
| `condition.py` | candidates re-ranked given the token they follow (own) |
| `sampling.py` | the target's token at every row, drawn with mlx-lm's samplers and processors |
| `randomness.py` | random numbers that depend on seed and place in the text alone |
| `result.py` | what a step decided, on the host: the only place that waits for the device |
| `statistics.py` | passes, drafts, and how many of them each pass kept |
| `plain.py` | plain decoding, one token per pass, with the same interface |
"""
