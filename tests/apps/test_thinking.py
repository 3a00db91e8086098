"""Thoughts and content in a text that arrives in pieces."""

from __future__ import annotations

import copy
import importlib
from itertools import groupby, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken

from mlx_specstream.apps.thinking import ThoughtMarks, ThoughtSplitter
from tests.support import tiny

MARKS = ThoughtMarks("<think>", "</think>")


def split(parts: list[str], marks: ThoughtMarks | None = MARKS, **options: bool) -> tuple[str, str]:
    """Return what of a text is thought and what is content."""
    splitter = ThoughtSplitter(marks, **options)
    found = [s for part in parts for s in splitter.feed(part)] + splitter.feed("", over=True)
    assert all(segment.text for segment in found)
    thought, content = (
        "".join(s.text for s in found if s.is_thought is kind) for kind in (True, False)
    )
    return thought, content


def test_a_thought_is_no_content() -> None:
    assert split(["<think>\nIs it?\n</think>\n\nYes.\n"]) == ("Is it?", "Yes.\n")
    assert split(["Is it?\n</think>\n\nYes."], inside=True) == ("Is it?", "Yes.")
    assert split(["a <b> c"]) == ("", "a <b> c")
    assert split(["one <think>a</think> two <think>b"]) == ("ab", "one  two ")


def test_a_mark_that_is_not_completed_is_text() -> None:
    assert split(["well </thi"], inside=True) == ("well </thi", "")
    assert split(["so <think"]) == ("", "so <think")


def test_a_mark_that_is_not_awaited_is_text() -> None:
    assert split(["a</think>b"]) == ("", "a</think>b")
    assert split(["a<think>b"], inside=True) == ("a<think>b", "")


def test_without_marks_all_is_content() -> None:
    assert split(["<think>a</think>\n"], None, inside=True) == ("", "<think>a</think>\n")


PARTS = st.lists(st.sampled_from(["<think>", "</think>", "\n", "a", "<", "/think>", " "]))


@given(PARTS, st.lists(st.integers(0, 60), max_size=8), st.booleans())
def test_cuts_change_nothing(parts: list[str], cuts: list[int], inside: bool) -> None:
    whole = "".join(parts)
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = [whole[a:b] for a, b in pairwise(places)] or [""]
    assert split(pieces, inside=inside) == split([whole], inside=inside)


@given(PARTS, st.booleans())
def test_marks_count_where_mlx_lm_counts_them(parts: list[str], inside: bool) -> None:
    """All but the line breaks next to marks is what mlx-lm's server would send."""
    mlx_lm = importlib.import_module("mlx_lm.generate")
    if not hasattr(mlx_lm, "TextStateMachine"):
        pytest.skip("mlx-lm 0.31, the last one for Python 3.10, has no such machine")
    machine = mlx_lm.TextStateMachine(
        {"normal": [("<think>", "reasoning")], "reasoning": [("</think>", "normal")]}
    )
    state = machine.make_state("reasoning" if inside else "normal")
    state, segments = machine.split(state, "".join(parts))
    state, flushed, last = machine.flush(state)
    expected = ["", ""]
    for kind, runs in groupby([*segments, (last, flushed)], key=lambda one: one[0]):
        expected[kind == "normal"] += "".join(text for _, text in runs)
    for mine, theirs in zip(split(parts, inside=inside), expected, strict=True):
        assert mine.replace("\n", "") == theirs.replace("\n", "")


def thinker(*marks: str) -> TokenizerWrapper:
    """The byte tokenizer with marks of thoughts."""
    fast = copy.deepcopy(tiny.hf_byte_tokenizer())
    fast.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    return TokenizerWrapper(fast)


@pytest.mark.parametrize(
    ("tokenizer", "start", "end"),
    [
        (thinker("<think>", "</think>"), "<think>", "</think>"),
        (thinker("<|channel>", "<channel|>"), "<|channel>thought", "<channel|>"),
    ],
)
def test_the_prompt_tells_where_the_answer_begins(
    tokenizer: TokenizerWrapper, start: str, end: str
) -> None:
    marks = ThoughtMarks.of(tokenizer)
    assert marks is not None
    for prompt, opened, closed in (
        ("<user>hi<eos><assistant>", False, False),
        (f"<user>hi<eos><assistant>{start}\n", True, False),
        (f"<user>hi<eos><assistant>{start}\n\n{end}\n\n", False, True),
        (f"<user>hi<eos><assistant>{start}\nwell", True, False),
        (f"<assistant>{start}cut off<eos><user>hi<eos><assistant>", False, False),
        (f"<user>hi<eos><assistant>{start}a{end}b{start}c", True, False),
    ):
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        assert marks.left_open(ids) is opened, prompt
        assert marks.closed(ids) is closed, prompt
        assert ThoughtSplitter.after(marks, ids).inside is opened
    assert not ThoughtSplitter.after(None, [1]).inside


def test_a_model_without_thoughts_has_no_marks() -> None:
    assert ThoughtMarks.of(tiny.byte_tokenizer()) is None
