"""Drafts looked up in the text itself: what followed when it last read as it does now.

    text ──► occurrences of its end ──► continuations, weighed by what was right so far

Works for any model, costs nothing on the device, and gains where an answer quotes: summaries,
edits, names, code. One `LookUp` serves one answer; what it knows of a conversation stays with the
conversation's KV cache, what it has learnt of its own success with the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from ....model.backbone import Backbone
from ....model.cache import KVCache
from .calibration import Calibration, groups
from .continuations import Continuations, continuations
from .files import FileIndex
from .text import Occurrence, TextIndex

_texts: WeakKeyDictionary[KVCache, TextIndex] = WeakKeyDictionary()
_calibrations: WeakKeyDictionary[Backbone, Calibration] = WeakKeyDictionary()


@dataclass(eq=False)
class LookUp:
    """Looks up the end of one text in itself, and in files.

    calibration: how often what was found was right.
    """

    calibration: Calibration = field(default_factory=Calibration)
    files: FileIndex | None = None
    text: TextIndex = field(default_factory=TextIndex)
    _found: list[Occurrence] | None = None

    @classmethod
    def of(cls, backbone: Backbone, files: FileIndex | None = None) -> LookUp:
        """Return one for a model, which remembers how often look-up was right."""
        return cls(_calibrations.setdefault(backbone, Calibration()), files)

    def begin(self, prompt: Sequence[int], cache: KVCache, history: Sequence[int] = ()) -> None:
        """Take in a prompt that follows what `cache` holds, its last token included.

        history: the text up to the prompt's end, if more of it is known than the prompt.
        """
        told = history if tuple(history[-len(prompt) :]) == tuple(prompt) else prompt
        start = max(0, cache.length + len(prompt) - len(told))
        text = _texts.setdefault(cache, TextIndex(start))
        text.truncate(cache.length)
        if text.end < cache.length:  # some were computed unseen
            if text.end < start or text.start > start:
                text = _texts[cache] = TextIndex(start)
            text.extend(told[text.end - start : len(told) - len(prompt)])
        text.extend(prompt)
        self.calibration.fade()
        self.text, self._found = text, None

    def take(self, tokens: Sequence[int]) -> None:
        """Append tokens that were drawn, and learn from each whether it could be looked up."""
        for token in tokens:
            self.calibration.learn(groups(self.occurrences), token)
            self.text.extend([token])
            self._found = None

    @property
    def occurrences(self) -> list[Occurrence]:
        """Return the earlier places of the text's end."""
        if self._found is None:
            self._found = self.text.occurrences()
            if self.files is not None:
                self._found += self.files.occurrences(self.text.tokens[-32:])
        return self._found

    def continuations(self, count: int, depth: int, *, chain: bool = False) -> Continuations:
        """Return at most `count` nodes of what may follow, `depth` deep, likeliest first."""
        return continuations(self.occurrences, self.calibration, count, depth, chain=chain)
