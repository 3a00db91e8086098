"""What a grammar lets stand before an answer that must fit it."""

from __future__ import annotations

import pytest

pytest.importorskip("llguidance")

from mlx_specstream.apps.serve.thought_rules import behind_thought
from mlx_specstream.apps.thinking import ThoughtMarks
from mlx_specstream.generation.grammar import Grammar
from tests.apps.serve.test_forced_calls import with_marks

ANSWER = 'answer: "yes"'
ADDED = (
    *("<think>", "</think>", "<|channel>", "<channel|>", "[THINK]", "[/THINK]"),
    *("<|open|>", "<|close|>", "<|sep|>"),
)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("<think>", "</think>"),
        ("<|channel>thought", "<channel|>"),
        ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
        ("[THINK]", "[/THINK]"),  # which llguidance takes for letters where the flag says so
    ],
)
def test_a_thought_comes_before_the_answer(start: str, end: str, special: bool) -> None:
    tokens = [part for part in ADDED if part in start + end]
    tokenizer = with_marks(*tokens, special=special)
    cut = {mark: tuple(tokenizer.encode(mark, add_special_tokens=False)) for mark in (start, end)}
    marks = ThoughtMarks(start, end, cut[start], cut[end], frozenset(tokenizer.eos_token_ids))

    def allows(prompt: str, text: str, marks: ThoughtMarks | None = marks) -> bool:
        ids = tokenizer.encode(f"<user>{prompt}", add_special_tokens=False)
        rules = behind_thought(ANSWER, tokenizer, marks, ids, len(tokenizer.get_vocab()))
        matcher = Grammar.lark(tokenizer, rules, len(tokenizer.get_vocab())).matcher()
        tokens = tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    thought = 'Is it?\n\n"no" yes {'
    # The prompt says nothing: a thought or none.
    assert allows("", "yes")
    assert allows("", f"{start}\n{thought}\n{end}\n\nyes")
    assert not allows("", f"{thought}{end}yes")
    assert not allows("", f"{start}{thought}yes")
    # The prompt opened a thought: it is to be ended.
    assert allows(f"{start}\n", f"{thought}\n{end}\n\nyes")
    assert allows(f"{start}\nWell, ", f"{end}yes")
    assert not allows(f"{start}\n", "yes")
    assert not allows(f"{start}\n", f"{thought}{end}\n\nno")
    assert not allows(f"{start}\n", f"{thought}{end}" + "\n" * 50 + "yes")
    # The prompt closed one, or the model has none: there is no other.
    for prompt, known in ((f"{start}\n\n{end}\n\n", marks), ("", None)):
        assert allows(prompt, "yes", known)
        assert not allows(prompt, f"{start}{thought}{end}yes", known)
