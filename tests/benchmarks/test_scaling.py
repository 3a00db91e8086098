"""The scaling study at tiny sizes: models of given shapes, step costs, yields, memory, the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from benchmarks import endurance, scaling, scaling_report
from benchmarks import studies as studies_module
from benchmarks.steps import step_cost
from benchmarks.studies import (
    STEP_STUDIES,
    TINY,
    Point,
    Study,
    config,
    made,
    run_study,
    studies,
)
from benchmarks.yields import yield_points
from mlx_specstream.errors import OptionError
from mlx_specstream.loading.load import StreamModel, load
from mlx_specstream.machine import Machine
from tests.support import tiny
from tests.support.random_models import filled_cache, random_model, random_streams


@pytest.mark.parametrize("bits", [4, 16, 32])
def test_models_of_a_shape(bits: int) -> None:
    model = random_model(TINY, bits)
    stream_model = StreamModel.plain(model)  # compares a probe with mlx-lm's own pass
    size = sum(a.nbytes for _, a in tree_flatten(model.parameters()) if a.ndim > 1)  # type: ignore[union-attr]
    scales = 0.5 if bits < 16 else 0  # scales and biases are float32 on a CPU
    assert size == pytest.approx(TINY.num_params * (bits + 2 * scales * 2) / 8, rel=0.3)
    logits = model(mx.array([[1, 2, 3]]))
    assert mx.all(mx.isfinite(logits)).item()
    assert 0.01 < mx.std(logits.astype(mx.float32)).item() < 100
    streams = random_streams(stream_model.backbone, 3, 2, conditioned=True)
    assert streams.num_streams == 3


def test_a_cache_without_a_prefill() -> None:
    streams = made(TINY, 32, 2, 1)()
    cache = filled_cache(streams.backbone, 300)
    assert cache.length == 300
    found = step_cost(streams, config("chain"), 300, 2)
    assert found.ratio == pytest.approx(found.step.median / found.plain.median)
    assert found.step.low <= found.step.median <= found.step.high


def test_every_study_has_points() -> None:
    for small in (True, False):
        for study in studies(STEP_STUDIES, made(TINY, 32, 4, 2), small):
            assert len(study.points) >= 4
            assert len({(p.value, p.series) for p in study.points}) == len(study.points)
            groups = [p.group for p in study.points]
            assert len(set(groups)) == sum(
                a != b for a, b in zip([None, *groups], groups, strict=False)
            )


def test_points_beyond_the_limit_are_left_out() -> None:
    point = Point(1, "a", "g", made(TINY, 32, 2, 1), config("2"))
    found = list(run_study(Study("s", "x", [point]), rounds=2, limit_s=0.0))
    assert found == [{"x": 1, "series": "a", "left_out": True}]
    (measured,) = run_study(Study("s", "x", [point]), rounds=2, limit_s=1e6)
    assert measured["ratio"] == measured["step_ms"][1] / measured["plain_ms"][1]


def test_yields(bench_model: str) -> None:
    model, tokenizer = load(bench_model)
    found = list(yield_points("yield-tree", model, tokenizer, 1, 6, small=True))
    assert {p["series"] for p in found} >= {"best-first", "chain", "16 rows, γ used 4"}
    alone = next(p for p in found if p["x"] == 1)
    assert alone["tokens_per_pass"] == 1.0
    assert all(1 <= p["tokens_per_pass"] <= 5 for p in found)
    contexts = list(yield_points("yield-context", model, tokenizer, 1, 4, small=True))
    assert [p["x"] for p in contexts] == [64, 64, 128, 128]


def test_memory_over_a_long_generation() -> None:
    model = endurance.small_model(tiny.VOCAB_SIZE)
    samples = list(endurance.long_generation(model, tiny.byte_tokenizer(), 200))
    assert [s["x"] for s in samples] == list(range(10, 201, 10))
    assert samples[-1]["kv_bytes"] >= samples[0]["kv_bytes"] > 0
    assert samples[-1]["process_bytes"] > 1e7
    assert abs(endurance.growth_bytes(samples)) < endurance.ALLOWED_BYTES


def test_growth_is_found() -> None:
    samples = [{"active_bytes": 10**6 * n + 500, "kv_bytes": 500} for n in range(20)]
    assert endurance.growth_bytes(samples) == 16 * 10**6


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling_report, "write_plots", lambda *_: [])
    words = ["--small", "--rounds", "2", "--output", str(tmp_path)]
    assert scaling.main(["tree", *words]) == 0
    assert scaling.main(["streams", *words]) == 0
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert list(record["studies"]) == ["tree", "streams"]  # earlier studies are kept
    assert {p["series"] for p in record["studies"]["tree"]["points"]} == {"deferred", "inline"}
    captured = capsys.readouterr()
    assert "| rows of the tree | series |" in captured.out
    assert "the study about" in captured.err
    report = (tmp_path / "scaling.md").read_text()
    assert scaling.main(["--from", str(tmp_path / "scaling.json")]) == 0
    assert (tmp_path / "scaling.md").read_text() == report


@pytest.mark.parametrize("words", [[], ["poetry"], ["tree", "--rounds", "1"]])
def test_refusals(words: list[str]) -> None:
    with pytest.raises(OptionError):
        scaling.main(words)


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = [
        {"x": 2, "series": "a", "step_ms": [1, 2, 3], "plain_ms": [1, 1, 1], "ratio": 2.0},
        {"x": 64, "series": "a", "left_out": True},
    ]
    sample = {"x": 1, "series": "t", "active_bytes": 2, "kv_bytes": 1, "process_bytes": 3,
              "kept_bytes": 0, "token_ms": 1.0}  # fmt: skip
    record = {
        "machine": {}, "model": "m", "rounds": 2, "started": "now",
        "studies": {
            "tree": {"grows": "rows", "points": points},
            "yield-tree": {"grows": "rows", "points": [{"x": 1, "series": "b", "tokens_per_pass": 1.5}]},
            "long": {"grows": "tokens", "points": [sample, {**sample, "x": 2}]},
        },
    }  # fmt: skip
    assert scaling_report.write_plots(record, tmp_path) == [
        "tree.png",
        "yield-tree.png",
        "long.png",
    ]
    assert "1 points left out" in scaling_report.markdown(record)


def test_counts_are_written_in_full() -> None:
    found = [scaling_report.number(value) for value in (8, 256, 32768, 262144.0, 0.493961, 3.21257)]
    assert found == ["8", "256", "32768", "262144", "0.494", "3.21"]


@pytest.mark.parametrize(("backend", "bits"), [("cpu", {"32", "4"}), ("metal", {"4", "16"})])
def test_sizes_are_of_precisions_that_the_machine_is_good_at(
    backend: str, bits: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = replace(Machine.read(), backend=backend)
    monkeypatch.setattr(studies_module.Machine, "read", lambda: machine)
    assert {point.series.split()[0] for point in studies_module.size_points(small=True)} == bits
