"""The command that measures a batch against requests in turn, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.batch import Line, main
from mlx_specstream.errors import OptionError
from tests.support import tiny
from tests.support.scripted import save_random_streams


def test_measures_all_methods_and_compares_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save_tiny_model(tmp_path / "tiny", num_hidden_layers=3)
    streams = save_random_streams(tmp_path / "streams", tiny.tiny_model(num_hidden_layers=3))
    options = ["--model", str(folder), "--streams", str(streams), "--batch", "2"]
    options += ["--groups", "2", "--rounds", "1", "--max-tokens", "5", "--tree", "chain", "--json"]
    assert main(options) == 0
    record = json.loads(capsys.readouterr().out)
    assert [line["method"] for line in record["lines"]] == [
        "in one batch",
        "in one batch, chain",
        "in turn, tree chain",
        "in one batch, plain",
        "in turn, plain",
        "mlx_lm.batch_generate",
    ]
    assert record["same_answers"] == 4
    for line in record["lines"]:
        assert line["tokens"] == record["lines"][0]["tokens"]
        assert len(line["seconds"]) == 2
    in_batch, in_turn = record["lines"][1:3]
    assert sum(in_batch["steps"]) < sum(in_turn["steps"])


def test_ratios_are_medians_over_groups() -> None:
    one = Line("one", [1.0, 1.0, 1.0], [30, 20, 10], [1, 1, 1])
    other = Line("other", [1.0, 1.0, 2.0], [10, 10, 10], [1, 1, 1])
    assert one.against(other) == 2.0
    assert one.tokens_per_s == 20.0


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(OptionError, match="--rounds"):
        main(["--rounds", "0"])
