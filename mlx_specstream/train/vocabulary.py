"""A step's part of the vocabulary: the head is its largest product, every row against every token.

All targets of the step, the most frequent tokens of the training text, and a random draw of the
others whose logits are raised by log(others / drawn), so that the sampled partition sum estimates
the whole one without bias.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

FREQUENT_SHARE = 0.8
"""Of the tokens that a step's head knows, unless their numbers are given."""


@dataclass(frozen=True)
class Vocabulary:
    """Some tokens of a vocabulary of V, on the host.

    tokens: (V',) int64. bias: (V',) float32, added to their logits. place: (V,) int32, where a token
    is among them.
    """

    tokens: np.ndarray
    bias: np.ndarray
    place: np.ndarray


@dataclass(frozen=True)
class VocabularySampler:
    """Draws the tokens of a step. frequent: always among them. num_random: how many others are."""

    vocab_size: int
    frequent: np.ndarray
    num_random: int

    @classmethod
    def of(
        cls, vocab_size: int, texts: Iterable[Sequence[int]], num_frequent: int, num_random: int
    ) -> VocabularySampler:
        """Return a sampler that knows the most frequent tokens of `texts`."""
        counts = Counter(token for text in texts for token in text) if num_frequent else Counter()
        frequent = [token for token, _ in counts.most_common(num_frequent)]
        return cls(vocab_size, np.array(frequent, dtype=np.int64), num_random)

    @classmethod
    def of_size(
        cls, vocab_size: int, texts: Iterable[Sequence[int]], size: int
    ) -> VocabularySampler:
        """Return a sampler of about `size` tokens beside the targets; 0: of the whole vocabulary."""
        if not size:
            return cls.of(vocab_size, (), 0, vocab_size)
        found = cls.of(vocab_size, texts, int(size * FREQUENT_SHARE), 0)
        return cls(vocab_size, found.frequent, max(1, size - len(found.frequent)))

    def draw(self, targets: np.ndarray, seed: Sequence[int]) -> Vocabulary | None:
        """Return a step's tokens, `targets` among them; None where they would be all there are."""
        known = np.zeros(self.vocab_size, dtype=bool)
        known[targets] = True
        known[self.frequent] = True
        fixed, others = np.flatnonzero(known), np.flatnonzero(~known)
        if self.num_random >= len(others):
            return None
        drawn = np.random.default_rng(seed).choice(others, size=self.num_random, replace=False)
        tokens = np.concatenate([fixed, np.sort(drawn)])
        bias = np.zeros(len(tokens), dtype=np.float32)
        bias[len(fixed) :] = np.log(len(others) / self.num_random) if self.num_random else 0.0
        place = np.zeros(self.vocab_size, dtype=np.int32)
        place[tokens] = np.arange(len(tokens))
        return Vocabulary(tokens, bias, place)
