"""Look-up: drafts from earlier occurrences of the text's end, for any model.

| file | the idea it holds |
|---|---|
| `look_up.py` | `LookUp`: the text of one answer, what follows it, and what was learnt |
| `text.py` | where the end of a text occurred before, in O(1) per token, and with undo |
| `files.py` | the same in files that do not change |
| `calibration.py` | how often what is found is right |
| `continuations.py` | what may follow, as a tree on the host |
| `merge.py` | the same tree made one with another drafter's, on the device |
"""

from .continuations import Continuations
from .files import FileIndex
from .look_up import LookUp
from .merge import MergedProposer, looked_up_tree, merged_tree

__all__ = [
    "Continuations",
    "FileIndex",
    "LookUp",
    "MergedProposer",
    "looked_up_tree",
    "merged_tree",
]
