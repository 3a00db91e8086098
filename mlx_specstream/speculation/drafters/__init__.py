"""Drafters: what proposes the tokens that a step verifies.

| file | the idea it holds |
|---|---|
| `drafter.py` | what any drafter is: what it needs of a pass, what it gives, what it keeps |
| `streams.py` | speculative streams as a drafter, in the verifying pass or behind it |
| `nothing.py` | a model without a drafter |
| `lookup/` | what followed when the text read so before: for any model, and in any drafter's tree |
"""

from .drafter import Drafter, Verified
from .nothing import NoDrafter
from .streams import StreamDrafter

__all__ = ["Drafter", "NoDrafter", "StreamDrafter", "Verified"]
