"""Texts, positions, targets and epochs."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")


from mlx_specstream.convert.pytorch import workers  # noqa: E402
from mlx_specstream.errors import DataError  # noqa: E402
from mlx_specstream.train.batches import Selection, epoch_batches  # noqa: E402
from mlx_specstream.train.data import read_distilled, split_held_out  # noqa: E402
from mlx_specstream.train.targets import rows_of_batch  # noqa: E402
from tests.convert.pytorch.conftest import example_of  # noqa: E402


def examples(count):
    return [example_of(("s", i), (1, i), tuple(range(10, 13 + i % 5))) for i in range(count)]


def test_targets_follow_the_text():
    text = example_of(("s", 0), (5, 6), (10, 11, 12, 13))
    rows = rows_of_batch([Selection(text, (1, 3))], num_streams=3)
    assert rows.index.tolist() == [0, 1, 2, 3]
    assert rows.target.tolist() == [11, 12, 13, 13]
    assert rows.parent.tolist() == [10, 11, 12, 12]
    assert rows.grandparent.tolist() == [6, 10, 11, 11]
    later = rows.within(3, 6)
    assert (later.index.tolist(), later.target.tolist(), later.stream.tolist()) == ([0], [13], [0])


def test_epochs_are_functions_of_seed_and_number():
    arguments = {"num_positions": 12, "fraction": 0.5, "seed": 3}
    first = list(epoch_batches(examples(30), epoch=0, **arguments))
    assert first == list(epoch_batches(examples(30), epoch=0, **arguments))
    assert first != list(epoch_batches(examples(30), epoch=1, **arguments))
    keys = [s.example.key for batch in first for s in batch]
    assert len(keys) == len(set(keys)) >= 27  # a short last batch may be dropped
    assert all(p in s.example.positions for batch in first for s in batch for p in s.positions)


def test_an_epoch_has_a_batch_however_few_its_texts_are():
    few = list(epoch_batches(examples(2), num_positions=900, fraction=1, seed=0, epoch=0))
    assert [len(batch) for batch in few] == [2]


def test_held_out_prompts_are_stable_and_apart():
    train, held = split_held_out(examples(40), 8)
    assert len(held) == 8
    assert {e.prompt for e in train}.isdisjoint(e.prompt for e in held)
    again, _ = split_held_out(examples(44), 8)
    assert len(set(train) - set(again)) <= 4


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shares_of_a_batch_are_the_batch(monkeypatch, processes):
    batch = [Selection(e, tuple(e.positions)) for e in examples(7)]
    monkeypatch.setattr(workers, "count", lambda: processes)
    found, rows = [], []
    for rank in range(processes):
        monkeypatch.setattr(workers, "rank", lambda rank=rank: rank)
        mine, part = workers.share(batch)
        rows.append(part)
        found += [(s.example.key, p) for s in mine for p in s.positions]
        assert sum(len(s.positions) for s in mine) == part.stop - part.start
    assert found == [(s.example.key, p) for s in batch for p in s.positions]
    assert [r.start for r in rows[1:]] == [r.stop for r in rows[:-1]]


def test_bad_lines_are_named(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt_ids": [1], "answer_ids": [2, 3]}) + "\nnot json\n")
    with pytest.raises(DataError, match="line 2"):
        read_distilled([file])
    file.write_text(json.dumps({"question": "x"}) + "\n")
    with pytest.raises(DataError, match="line 1"):
        read_distilled([file])
