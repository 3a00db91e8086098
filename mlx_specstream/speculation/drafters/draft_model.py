"""A draft model: a smaller model of the same vocabulary, which reads the text as the base does.

Any model that mlx-lm loads and whose layers keep no state. It drafts chains or trees: every level's
nodes are read as rows of one pass, each with its own position, as the base reads a tree.
"""

from __future__ import annotations

import mlx.core as mx

from ...config import MAX_STREAMS
from ...errors import ModelError
from ...model.backbone import Backbone
from ...model.cache import KVCache
from .own_rows import RowPlace
from .unrolled import UnrolledDrafter


class DraftModelDrafter(UnrolledDrafter):
    """A draft model as a drafter.

    Raises:
        ModelError: its layers keep a state.
    """

    reads_root = True

    def __init__(self, backbone: Backbone, draft: Backbone) -> None:
        self.backbone, self.draft, self.depth = backbone, draft, MAX_STREAMS
        if draft.is_recurrent:
            raise ModelError(
                f"a {draft.family} model cannot draft: some of its layers keep a state, which drafts "
                "that are not accepted would spoil; use a draft model without such layers."
            )

    def new_rows(self) -> KVCache:
        """Return an empty cache for the draft model."""
        return self.draft.new_cache()

    def read_rows(self, tokens: mx.array, features: mx.array | None, place: RowPlace) -> mx.array:
        """Run the draft model over rows (R); return its states before the final norm."""
        del features
        tokens = mx.minimum(tokens, self.draft.vocab_size - 1)  # of a base with more padding
        every = range(self.draft.num_layers)
        hidden = self.draft.embed(tokens)
        return self.draft.run(hidden, every, place.kv, place.start, place.positions, place.mask)

    def logits(self, states: mx.array) -> mx.array:
        """Return the draft model's logits (R, V) of tokens that the base has, too."""
        logits = self.draft.logits(states)
        return logits[:, : self.backbone.vocab_size]
