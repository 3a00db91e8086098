"""Look-up in a batch: what may follow the text of each request, and as much of it as pays.

Every request has an index of its own text, and all learn together how often look-up is right. A pass
is as long for all as for the one with most to verify, so how long that is, is decided for all.

Looking up takes the host some 50 microseconds a request while the device waits. Where nothing has
been worth verifying for a while, it is done in one pass of four.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import DecodeConfig
from ..loading.load import StreamModel
from ..model.cache import KVCache
from ..planner.lookup import looks_up
from ..speculation.drafters.lookup import Continuations, FileIndex, LookUp
from .governor import BatchGovernor
from .sequence import BatchSequence

PATIENCE = 32  # passes without anything worth verifying, after which
SELDOM = 4  # only every fourth pass looks up


@dataclass
class BatchLookUp:
    """Looks up what may follow, for all requests of a batch.

    depth: the longest chain, where no governor decides. files: what else to look up in.
    """

    model: StreamModel
    depth: int
    governor: BatchGovernor | None
    files: FileIndex | None
    in_vain: int = 0  # passes since something was worth verifying

    @classmethod
    def of(
        cls,
        model: StreamModel,
        config: DecodeConfig,
        governor: BatchGovernor | None,
        files: FileIndex | None,
    ) -> BatchLookUp | None:
        """Return what looks up for a config, None if nothing is looked up.

        Raises:
            OptionError: look-up alone was asked for where it cannot be.
        """
        if not looks_up(model, config):
            return None
        levels = model.streams.num_streams if model.streams is not None else 0
        return cls(model, config.tree.look_up_size(levels)[1], governor, files)

    def begin(
        self, prompt: Sequence[int], cache: KVCache, history: Sequence[int], text: Sequence[int]
    ) -> LookUp:
        """Return what looks up for a request whose `prompt` follows what `cache` holds.

        history, text: what is known of the text before the answer, where that is more.
        """
        lookup = LookUp.of(self.model.backbone, self.files, text)
        lookup.begin(prompt, cache, history)
        if self.governor is not None:
            self.governor.begin()
        return lookup

    def found(
        self, sequences: Sequence[BatchSequence], drafted: int
    ) -> tuple[list[Continuations], int]:
        """Return what to verify of what may follow each text, and a chain's rows where that widens it.

        drafted: how many drafts streams have made for each chain.
        """
        streams, depth = self.model.streams, self.depth
        if not drafted and streams is not None and streams.shared:
            return nothing(
                sequences
            )  # every row has its streams: there look-up adds to drafts alone
        if self.governor is not None:
            depth = self.governor.longest
            self.in_vain += 1
            if self.in_vain > PATIENCE and self.in_vain % SELDOM:
                return nothing(sequences)
        found = []
        for sequence in sequences:
            assert sequence.lookup is not None
            found.append(sequence.lookup.continuations(depth, depth, chain=True))
        if self.governor is None:
            longest = max(map(len, found))
            return found, 1 + longest if longest > drafted else 0
        rows = self.governor.rows(drafted, found)
        verified = [one.first((rows or 1 + drafted) - 1) for one in found]
        if any(map(len, verified)):
            self.in_vain = 0
        return verified, rows


def nothing(sequences: Sequence[BatchSequence]) -> tuple[list[Continuations], int]:
    """Return that nothing is to be verified for any of them."""
    return [Continuations.none() for _ in sequences], 0
