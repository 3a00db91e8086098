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

    calibration: how often what was found was right. known: the text up to the prompt's end, where
    more of it is known than the prompt.
    """

    calibration: Calibration = field(default_factory=Calibration)
    files: FileIndex | None = None
    known: Sequence[int] = ()
    text: TextIndex = field(default_factory=TextIndex)
    _found: list[Occurrence] | None = None
    _unread: Sequence[int] = ()  # of the prompt
    _drawn: list[int] = field(default_factory=list)  # and of the answer

    @classmethod
    def of(
        cls, backbone: Backbone, files: FileIndex | None = None, known: Sequence[int] = ()
    ) -> LookUp:
        """Return one for a model, which remembers how often look-up was right."""
        return cls(_calibrations.setdefault(backbone, Calibration()), files, known)

    def begin(self, prompt: Sequence[int], cache: KVCache, history: Sequence[int] = ()) -> None:
        """Take in a prompt that follows what `cache` holds, its last token included.

        history: as `known`, which comes first.
        """
        told = prompt
        for known in (self.known, history):
            if len(known) > len(told) and list(known[-len(prompt) :]) == list(prompt):
                told = known
        told = told[-(cache.length + len(prompt)) :]
        start = cache.length + len(prompt) - len(told)
        text = _texts.setdefault(cache, TextIndex(start))
        text.truncate(cache.length)
        if text.end < start or text.start > start:  # some were computed unseen
            text = _texts[cache] = TextIndex(start)
        self.calibration.fade()
        self.text, self._found, self._unread = text, None, told[text.end - start :]
        self._drawn = []

    def keep_beside(self, cache: KVCache) -> None:
        """Keep what is known of the text beside another cache of it, for who goes on from there."""
        self.read()
        _texts[cache] = self.text

    def hear(self, tokens: Sequence[int]) -> None:
        """Note tokens that were drawn, to be taken in by `read`."""
        self._drawn += tokens

    def read(self) -> None:
        """Index what is not yet, and learn from each token drawn whether it could be looked up.

        A good moment is while the device is at work.
        """
        if self._unread:
            self.text.extend(self._unread)
            self._unread = ()
        drawn, self._drawn = self._drawn, []
        for token in drawn:
            self.calibration.learn(groups(self.occurrences), token)
            self.text.extend([token])
            self._found = None

    def take(self, tokens: Sequence[int]) -> None:
        """Take in tokens that were drawn."""
        self.hear(tokens)
        self.read()

    @property
    def occurrences(self) -> list[Occurrence]:
        """Return the earlier places of the text's end."""
        if self._unread or self._drawn:
            self.read()
        if self._found is None:
            self._found = self.text.occurrences()
            if self.files is not None:
                self._found += self.files.occurrences(self.text.tokens[-32:])
        return self._found

    def continuations(self, count: int, depth: int, *, chain: bool = False) -> Continuations:
        """Return at most `count` nodes of what may follow, `depth` deep, likeliest first."""
        return continuations(self.occurrences, self.calibration, count, depth, chain=chain)
