"""A model without a drafter: its trees come from look-up alone."""

from __future__ import annotations

from ...config import TreeSpec
from ...model.backbone import Backbone
from ...model.cache import KVCache
from ..accept import AcceptedPath
from ..tree import Proposer
from .drafter import Drafter, Verified


class NoDrafter(Drafter):
    """Proposes nothing, on no level."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.depth = backbone, 0

    def propose(
        self, verified: Verified, path: AcceptedPath, cache: KVCache, spec: TreeSpec
    ) -> Proposer | None:
        """Return None: there is nothing to propose."""
        del verified, path, cache, spec
        return None
