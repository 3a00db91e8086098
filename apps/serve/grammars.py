"""Grammars of answers, compiled within a time limit; those used last are kept."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from ...generation.grammar import Grammar, tokenizer_text
from .timed import FailedError, OutOfTimeError, TimedProcess

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

KEPT = 16
LIMIT_S = 10.0


class GrammarStore:
    """Grammars for one model's vocabulary; for one thread at a time.

    Whether a grammar can be compiled in time is tried in another process first.
    """

    def __init__(self, tokenizer: TokenizerWrapper, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.limit_s = LIMIT_S
        self.trial: TimedProcess | None = None
        self._kept: OrderedDict[str, Grammar] = OrderedDict()

    def lark(self, rules: str) -> Grammar:
        """Return the grammar of Lark's rules.

        Raises:
            DataError: it cannot be used, or takes too long to compile.
            OptionError: the server cannot use any.
        """
        if rules not in self._kept:
            self._try(rules)
            self._kept[rules] = Grammar.lark(self.tokenizer, rules, self.vocab_size)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(rules)
        return self._kept[rules]

    def close(self) -> None:
        """End what is under way."""
        if self.trial is not None:
            self.trial.close()

    def _try(self, rules: str) -> None:
        if self.trial is None:
            first = _vocabulary(self.tokenizer, self.vocab_size)
            if first is None:  # then compiling says why
                return
            self.trial = TimedProcess("grammars", first)
        try:
            self.trial.ask(rules, self.limit_s)
        except (FailedError, OSError):  # what fails there fails here, with words
            return
        except OutOfTimeError:
            raise DataError(
                f"the grammar takes more than {self.limit_s:g} s to compile; use a simpler one, with "
                "fewer properties, alternatives and patterns."
            ) from None


def _vocabulary(tokenizer: TokenizerWrapper, vocab_size: int) -> dict[str, Any] | None:
    """Return what llguidance needs of a tokenizer, None of one that is not a fast one."""
    text = tokenizer_text(tokenizer)
    if text is None:
        return None
    ends = sorted(int(token) for token in tokenizer.eos_token_ids)
    return {"tokenizer": text, "vocab_size": vocab_size, "ends": ends}
