"""What may stand before an answer that must fit a grammar: the model's thought, in Lark.

the prompt left a thought open       the rest of it, its end mark, then the answer
the prompt closed one                the answer alone
neither                              a whole thought or none, then the answer
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...generation.grammar import lark_mark

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..thinking import ThoughtMarks

_BREAKS = r"/[\r\n]{0,4}/"  # behind the mark, as chat templates write them


def behind_thought(
    answer: str,
    tokenizer: TokenizerWrapper,
    marks: ThoughtMarks | None,
    prompt: Sequence[int],
    vocab_size: int,
) -> str:
    """Return a grammar whose answer, the rule `answer`, comes behind the thought, if there is one."""
    if marks is None or marks.closed(prompt):
        return f"start: answer\n{answer}"
    end = lark_mark(tokenizer, marks.end, vocab_size)
    if end.startswith("<["):
        # No letters are a special token, so any text ends there.
        rules = f"thought: inner {end} {_BREAKS}\ninner: /(.|\\n)*/"
    else:
        rules = f"thought: inner {_BREAKS}\ninner[suffix={json.dumps(marks.end)}]: /(.|\\n)*/"
    if marks.left_open(prompt):
        return f"start: thought answer\n{rules}\n{answer}"
    begin = lark_mark(tokenizer, marks.start, vocab_size)
    return f"start: ({begin} thought)? answer\n{rules}\n{answer}"
