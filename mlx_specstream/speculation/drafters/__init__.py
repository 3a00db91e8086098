"""Drafters: what proposes the tokens that a step verifies.

| file | the idea it holds |
|---|---|
| `drafter.py` | what any drafter is: what it needs of a pass, what it gives, what it keeps |
| `streams.py` | speculative streams as a drafter, in the verifying pass or behind it |
"""

from .drafter import Drafter, Verified
from .streams import StreamDrafter

__all__ = ["Drafter", "StreamDrafter", "Verified"]
