"""Drafters: what proposes the tokens that a step verifies.

| file | the idea it holds |
|---|---|
| `drafter.py` | what any drafter is: what it needs of a pass, what it gives, what it keeps |
| `streams.py` | speculative streams as a drafter, in the verifying pass or behind it |
| `own_rows.py` | drafters with a cache of their own, in step with the base's |
| `unrolled.py` | drafters that read their own drafts, level by level |
| `layer.py` | a decoder layer that a drafter has of its own |
| `medusa.py` | Medusa-1: heads that know nothing of each other |
| `hydra.py` | Hydra: heads that know the tokens before theirs; Hydra++ |
| `eagle.py` | EAGLE: a layer that continues the base's features; EAGLE-3 |
| `draft_model.py` | a smaller model of the same vocabulary |
| `trained.py` | the drafter of a folder's weights |
| `nothing.py` | a model without a drafter |
| `lookup/` | what followed when the text read so before: for any model, and in any drafter's tree |
"""

from .drafter import Drafter, Verified
from .nothing import NoDrafter
from .streams import StreamDrafter

__all__ = ["Drafter", "NoDrafter", "StreamDrafter", "Verified"]
