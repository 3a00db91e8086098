"""Several requests in one pass: chains with an accept length per sequence [SS App. F].

| file | the idea it holds |
|---|---|
| `cache.py` | sequences of their own lengths side by side in one buffer |
| `rows.py` | where a pass's rows stand, and whom each of them sees |
| `check.py` | which models can be batched exactly |
| `chains.py` | what a pass verifies: chains of streams, of look-up, or of both |
| `choose.py` | every sequence's own sampler and processors |
| `step.py` | one pass: verify every chain, draft the next ones |
| `scheduled.py` | a pass under way, and what it decided for each request |
| `sequence.py` | a request in the batch, from waiting to finished |
| `governor.py` | whether drafting pays beside the other requests, by timing both ways |
| `lookup.py` | what may follow each request's text, as far as verifying it pays |
| `decode.py` | the loop that requests join and leave |
| `generation.py` | texts in, texts out: `batch_generate` |
"""

from .decode import BatchDecoder
from .governor import BatchGovernor
from .sequence import BatchEvent, BatchSequence

__all__ = ["BatchDecoder", "BatchEvent", "BatchGovernor", "BatchSequence"]
