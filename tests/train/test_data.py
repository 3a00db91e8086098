"""Data in mlx-lm's formats, prompts masked, and bad input named by file and line."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from mlx_specstream.errors import DataError
from mlx_specstream.train.batches import BatchPlan, epoch_order, select, shard
from mlx_specstream.train.data import (
    Example,
    read_records,
    record_tokens,
    split_held_out,
    tokenize,
)
from mlx_specstream.train.segments import cut
from mlx_specstream.train.targets import rows_of, stream_weights, target_counts
from tests.support.tiny import ASSISTANT, EOS, USER
from tests.train.plain import everything, some_texts


def write(path, *records) -> str:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
PROMPT = [USER, *b"hi", EOS, ASSISTANT]
ANSWER = [*b"yes"]


@pytest.mark.parametrize(
    ("record", "mask", "tokens", "prompt"),
    [
        (CHAT, True, [USER, *b"hi", EOS, ASSISTANT, *b"yes", EOS], 5),
        (
            {"prompt": "hi", "completion": "yes"},
            True,
            [USER, *b"hi", EOS, ASSISTANT, *b"yes", EOS],
            5,
        ),
        (CHAT, False, [USER, *b"hi", EOS, ASSISTANT, *b"yes", EOS], 0),
        ({"text": "hello"}, True, [*b"hello", EOS], 0),
    ],
)
def test_formats(tmp_path, byte_tokenizer, record, mask, tokens, prompt) -> None:
    (found,) = read_records(write(tmp_path / "a.jsonl", record), "train")
    assert record_tokens(found, byte_tokenizer, mask) == (tokens, prompt)


def test_exact_ids_are_used_if_they_spell_the_text(tmp_path, byte_tokenizer) -> None:
    exact = {**CHAT, "prompt_ids": [7, 8], "answer_ids": [*b"yes", EOS]}
    wrong = {**CHAT, "prompt_ids": [7, 8], "answer_ids": [*b"no", EOS]}
    first, second = read_records(write(tmp_path / "a.jsonl", exact, wrong), "train")
    assert record_tokens(first, byte_tokenizer) == ([7, 8, *b"yes", EOS], 2)
    assert record_tokens(second, byte_tokenizer)[1] == 5


def test_cut_and_left_out_are_counted(tmp_path, byte_tokenizer) -> None:
    long = {"prompt": "hi", "completion": "y" * 50}
    records = read_records(
        write(tmp_path / "a.jsonl", CHAT, long, {"prompt": "p" * 50, "completion": "y"}), "train"
    )
    examples, report = tokenize(records, byte_tokenizer, max_length=20)
    assert [len(e.tokens) for e in examples] == [9, 20]
    assert str(report) == (
        "2 examples, 1 cut to the maximum length, 1 left out (fewer than two completion tokens)"
    )
    assert examples[0].positions == range(4, 7)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "line 2 is not valid JSON"),
        ("[1]", "line 2 must be a JSON object, got list"),
        ({"question": "x"}, "line 2 has neither messages, nor prompt and completion, nor text"),
        ({"prompt": "x", "completion": 3}, "line 2: completion must be a string, got int"),
        ({"messages": []}, "line 2: messages must be a list"),
        ({"messages": [{"content": "x"}]}, "line 2: every message must be an object with a role"),
        ({"messages": [{"role": "user"}]}, "line 2: every message must have its content"),
        ({**CHAT, "tools": "x"}, "line 2: tools must be a list"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, said) -> None:
    with pytest.raises(DataError, match="a.jsonl, " + said):
        read_records(write(tmp_path / "a.jsonl", CHAT, line), "train")


def test_bad_places_are_named(tmp_path, byte_tokenizer, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no train\.jsonl"):
        read_records(tmp_path / "empty", "train")
    with pytest.raises(DataError, match="there is no data at"):
        read_records(tmp_path / "none.jsonl", "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="need the package datasets"):
        read_records("owner/name", "train")
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_records(tmp_path / "a.jsonl", "train")
    records = read_records(write(tmp_path / "b.jsonl", {"prompt": "x", "completion": ""}), "train")
    with pytest.raises(DataError, match="none of the 1 records has two completion tokens"):
        tokenize(records, byte_tokenizer, max_length=100)


def test_held_out_prompts_do_not_depend_on_what_else_is_there() -> None:
    texts = [Example((1, i, 3, 4, 5), 2, f"line {i}") for i in range(40)]
    train, held = split_held_out(texts, 5)
    assert len(held) == 5
    assert not {e.tokens[:2] for e in held} & {e.tokens[:2] for e in train}
    _, later = split_held_out(texts[:20], 5)
    assert {e.where for e in held if int(e.where.split()[1]) < 20} <= {e.where for e in later}


def test_every_text_comes_once_an_epoch_and_lengths_are_alike() -> None:
    lengths = list(np.random.default_rng(0).integers(10, 200, 50))
    for epoch in range(2):
        batches = epoch_order(lengths, 8, seed=1, epoch=epoch)
        assert sorted(i for b in batches for i in b) == list(range(50))
        spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
        assert np.mean(spread) < 60
    assert epoch_order(lengths, 8, 1, 0) != epoch_order(lengths, 8, 1, 1)
    texts = some_texts(lengths=(11, 8, 6, 9, 14))
    plan = BatchPlan(texts, 2, 0.5, seed=3)
    assert plan.batch(4) == plan.batch(4)
    assert plan.batch(4) != plan.batch(1)
    batch = plan.batch(0)
    assert [s for r in range(2) for s in shard(batch, r, 2)] == [batch[0], batch[1]]


def test_rows_have_their_targets_and_weights_add_up_to_one() -> None:
    batch = [select(e, 0.6, (i,)) for i, e in enumerate(some_texts(lengths=(11, 8, 6)))]
    segments = cut([s.positions for s in batch], 3)
    rows = rows_of(segments, batch, 3)
    seen = set()
    fields = ("index", "stream", "text", "target", "parent", "grandparent", "teacher")
    columns = [getattr(rows, name) for name in fields]
    for index, j, text, target, parent, before, at in zip(*columns, strict=True):
        tokens, t = batch[text].example.tokens, at - j - 1
        assert t in batch[text].positions
        assert segments.positions.reshape(-1)[index // 3] == t
        assert [before, parent, target] == list(tokens[t + j : t + j + 3])
        seen.add((text, t, j))
    assert len(seen) == len(rows.index) == target_counts(batch, 3).sum()
    weights = stream_weights(target_counts(batch, 3), 0.8)
    assert weights[rows.stream].sum() == pytest.approx(1)
    assert len(everything(some_texts())[0].positions) == 7
