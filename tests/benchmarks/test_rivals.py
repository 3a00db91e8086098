"""Rivals beside each other: trained alike, counted on the same text, compared and tabled."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from benchmarks import rivals, rivals_report, rivals_timing, rivals_train
from benchmarks.rivals_draft_model import DraftModelObjective, spread
from benchmarks.rivals_field import OURS, TREES, entered, joined
from benchmarks.rivals_results import Results, comparable, tokens_per_pass
from benchmarks.rivals_trainee import trainees
from mlx_specstream import load
from mlx_specstream.bench.measure import Answered
from mlx_specstream.commands.train import CPU_VOCABULARY, read_data
from mlx_specstream.errors import DataError, OptionError
from mlx_specstream.train.batches import BatchPlan, Selection
from mlx_specstream.train.data import Example
from mlx_specstream.train.drafter_loss import DrafterObjective
from mlx_specstream.train.drafters import drafter_config, train_drafter
from mlx_specstream.train.head import Head
from mlx_specstream.train.options import TrainOptions
from mlx_specstream.train.vocabulary import VocabularySampler
from tests.support import tiny

METHODS = ["medusa", "eagle", "draft-model"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("rivals") / "base"
    return str(tiny.save_tiny_model(folder, max_position_embeddings=1024))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rivals") / "own.jsonl"
    texts = [{"prompt": f"say {n}", "completion": "na " * (4 + n % 5)} for n in range(24)]
    path.write_text("\n".join(json.dumps(text) for text in texts))
    return str(path)


def run(monkeypatch: pytest.MonkeyPatch, module, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["study", *words])
    assert module.main() == 0


def train(monkeypatch: pytest.MonkeyPatch, base: str, data: str, output: Path, *more: str) -> None:
    words = ["--model", base, "--data", data, "--output", str(output), "--iters", "3"]
    words += ["--batch-size", "2", "--methods", *METHODS, "--keep-layers", "2", *more]
    run(monkeypatch, rivals_train, *words, "--learning-rate", "1e-3", "1e-2")


@pytest.fixture(scope="module")
def trained(base: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("rivals") / "trained"
    with pytest.MonkeyPatch.context() as patch:
        train(patch, base, data, output)
    return output


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    (file,) = folder.glob("*.safetensors")
    found = mx.load(str(file))
    assert isinstance(found, dict)
    return {name: np.array(tensor) for name, tensor in found.items()}


def test_a_stopped_run_ends_as_an_unbroken_one(
    monkeypatch, base: str, data: str, trained: Path, tmp_path
) -> None:
    train(monkeypatch, base, data, tmp_path, "--stop-after", "2")
    assert not (tmp_path / METHODS[0]).exists()
    train(monkeypatch, base, data, tmp_path)
    for kind in METHODS:
        told = [
            json.loads((f / kind / rivals_train.RESULTS).read_text()) for f in (trained, tmp_path)
        ]
        for name, tensor in weights_of(trained / kind).items():
            np.testing.assert_array_equal(weights_of(tmp_path / kind)[name], tensor)
        assert told[0]["held_out"] == told[1]["held_out"]
        assert told[0]["positions"] == told[1]["positions"] > 0
        best = min(told[0]["held_out"], key=told[0]["held_out"].get)
        assert float(best) == told[0]["learning_rate"]


def test_beside_others_a_method_is_trained_as_by_specstream_train(
    base: str, data: str, tmp_path
) -> None:
    model, tokenizer = load(base, streams=None)
    options = TrainOptions(iters=3, batch_size=2, learning_rate=1e-2, max_seq_length=256)
    texts, _ = read_data(data, tokenizer, model, options, talk=False)
    alone = train_drafter(
        "eagle", model.backbone, options, texts, tmp_path / "alone", None, say=lambda _: None
    )
    together = rivals_train.Run(
        model,
        trainees(model, METHODS, [1e-2], 2, options),
        VocabularySampler.of_size(tiny.VOCAB_SIZE, (), CPU_VOCABULARY),
        BatchPlan(texts, 2, options.position_fraction, options.seed),
    )
    losses = [together.update()["eagle 0.01"] for _ in range(3)]
    np.testing.assert_allclose(losses, alone, rtol=1e-5)


def gradient_of(base: str, keep: int) -> float:
    """The norm of the gradient with which a draft model of `keep` layers would begin."""
    model, tokenizer = load(base, streams=None)
    objective = DraftModelObjective(model.backbone, spread(4, keep))
    text = tokenizer.encode("a text of some length")
    reader = DrafterObjective(model.backbone, drafter_config("medusa", model.backbone, 1))
    example = Example(tuple(text), 4)
    batch, bases = [Selection(example, tuple(example.positions))], [reader.base(text)]

    def loss(tensors):
        return objective.loss(tensors, batch, bases, Head(model.backbone))[0]

    gradient = mx.grad(loss)(objective.start)
    return float(sum((g.square().sum() for g in gradient.values()), mx.array(0.0)).item()) ** 0.5


def test_a_draft_model_learns_what_the_base_says_at_the_same_place(base: str) -> None:
    """With all layers it is the base, whose distribution it cannot come nearer to."""
    assert gradient_of(base, 4) < 1e-4
    assert gradient_of(base, 2) > 1e-2


def test_layers_kept_are_spread_from_first_to_last() -> None:
    assert spread(30, 6) == [0, 6, 12, 17, 23, 29]
    assert spread(4, 2) == [0, 3]


def test_a_draft_model_shares_the_tables_of_its_base(base: str, trained: Path) -> None:
    model, _ = load(base, streams=None, draft_model=trained / "draft-model")
    small = dict(tree_flatten(load(str(trained / "draft-model"), streams=None)[0].parameters()))
    whole = dict(tree_flatten(model.model.parameters()))
    name = "model.embed_tokens.weight"
    np.testing.assert_array_equal(np.array(small[name]), np.array(whole[name]))
    assert sum(".q_proj." in key for key in small) == 2


@pytest.fixture(scope="module")
def counted(base: str, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rivals") / "rivals.json"
    words = ["--model", base, "--folder", str(trained), "--results", str(path), "-m", "10"]
    words += ["--categories", "math", "rag", "--num-prompts", "2"]
    with pytest.MonkeyPatch.context() as patch:
        run(patch, rivals, *words, "--count")
        run(patch, rivals, *words, "--cost")
        run(patch, rivals, *words, "--clock")
    return path


def test_every_cell_is_measured_and_every_answer_the_models_own(counted: Path) -> None:
    known = json.loads(counted.read_text())
    assert list(known["cells"]) == ["Medusa", "EAGLE-2", "draft model", "look-up"]
    for trees in known["cells"].values():
        assert list(trees) == list(TREES)
        for cells in trees.values():
            assert list(cells) == ["maths", "RAG"]
            for answers in cells.values():
                assert [verdict for _, _, verdict in answers] == ["identical"] * 2
                assert all(passes <= tokens <= 10 for tokens, passes, _ in answers)
    assert known["training"]["EAGLE-2"]["updates"] == 3
    assert known["parameters"]["look-up"] == 0 < known["parameters"]["Medusa"]
    steps = known["cost"]["steps"]
    assert {name: list(trees) for name, trees in steps.items()} == {
        name: list(TREES) for name in known["cells"]
    }
    assert all(price > 0 for trees in steps.values() for price in trees.values())
    assert len(known["clock"]["methods"]) == 4
    assert known["clock"]["differing"] == 0


def test_counting_goes_on_where_it_was_stopped(
    monkeypatch, base: str, trained: Path, counted: Path, tmp_path
) -> None:
    """Also prompt by prompt: a cell with one of two gets the other, and none is counted twice."""
    words = ["--model", base, "--folder", str(trained), "-m", "10", "--categories", "math", "rag"]
    path = tmp_path / "again.json"
    run(monkeypatch, rivals, *words, "--results", str(path), "--num-prompts", "1", "--count")
    results = Results(path)
    first = results.get("cells", "Medusa", "8", "maths")
    assert len(first) == 1
    results.change(lambda known: known["cells"]["Medusa"]["8"].pop("maths"))
    results.keep("cells", "EAGLE-2", "8", "maths", value=[[77, 7, "identical"]] * 2)
    run(monkeypatch, rivals, *words, "--results", str(path), "--num-prompts", "2", "--count")
    again, whole = results.read()["cells"], Results(counted).read()["cells"]
    assert again["EAGLE-2"]["8"].pop("maths")[0][0] == 77
    whole["EAGLE-2"]["8"].pop("maths")
    assert again == whole


def cell(tokens: int, passes: int) -> dict[str, int]:
    return {
        "prompts": 1, "tokens": tokens, "passes": passes, "identical": 1, "near-tie": 0, "mismatch": 0,
    }  # fmt: skip


def known_of(**by_name: dict[str, tuple[int, int]]) -> dict:
    names = {"ours": OURS, "eagle": "EAGLE-3"}
    cells = {
        names[name]: {
            tree: {task: [[*counts, "identical"]] for task, counts in tasks.items()}
            for tree in TREES
        }
        for name, tasks in by_name.items()
    }
    return {"cells": cells, "parameters": {OURS: 2_000_000}}


def test_rivals_are_compared_on_what_all_have_answered() -> None:
    known = known_of(ours={"maths": (30, 10)}, eagle={"maths": (20, 10)})
    known["cells"][OURS]["8"]["maths"].append([100, 10, "identical"])
    known["cells"]["EAGLE-3"]["16"]["chat"] = [[10, 10, "identical"]]
    found = comparable(known)
    assert found[OURS]["8"] == {"maths": cell(30, 10)}
    assert found["EAGLE-3"]["16"] == {"maths": cell(20, 10)}
    with pytest.raises(DataError, match="no task that every method"):
        rivals_report.table(
            {"cells": {"a": {"8": {}}, "b": {"8": {"chat": [[1, 1, "identical"]]}}}}
        )


def test_the_table_says_where_a_rival_is_ahead(tmp_path) -> None:
    known = known_of(
        eagle={"maths": (20, 10), "chat": (25, 10)}, ours={"maths": (30, 10), "chat": (20, 10)}
    )
    known["cost"] = {
        "machine": "a Mac", "versions": "MLX 1", "date": "2026-11-28", "prompts": 2,
        "steps": {OURS: {"chain4": 2.0, "8": 1.25, "16": 5.0}, "EAGLE-3": {"8": 2.0}},
    }  # fmt: skip
    lines = rivals_report.table(known)
    assert (
        f"| {OURS} | 2.00 M | 2.50 | 2.50 | 2.50 | 2.00 | 1.25 | 5.00 | 1.25 | 2.00 | 0.50 |"
        in lines
    )
    rows = [line.split(" | ")[0] for line in lines if line.startswith("| ")]
    assert rows[1:3] == [
        f"| {OURS}",
        "| EAGLE-3",
    ]  # in the field's order, whoever was counted first
    assert any(
        "EAGLE-3 gives more" in line and "chat as a chain (2.50 to 2.00)" in line for line in lines
    )
    assert not any("maths as a chain" in line for line in lines)
    assert rivals_timing.best(known)[0] == (OURS, "8", 2.0)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{rivals_report.BEGIN}\nold\n{rivals_report.END}\nafter\n")
    rivals_report.write_section(page, lines)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert lines[0] in text
    page.write_text("no marks")
    with pytest.raises(DataError, match="has no"):
        rivals_report.write_section(page, lines)


def test_the_passage_of_time_is_that_after_the_first_pass() -> None:
    answered = Answered(tokens=[1, 2, 3, 4, 5], decode_s=8.0, passes=3)
    assert rivals_timing.token_s(answered) == 2.0
    assert rivals_timing.step_s(answered) == 4.0
    assert rivals_timing.step_s(Answered(tokens=[1], decode_s=0.0, passes=1)) is None
    assert tokens_per_pass({"a": cell(8, 4), "b": cell(2, 1)}) == 2.0
    assert tokens_per_pass({"a": cell(8, 4)}, "b") is None


@pytest.mark.parametrize(("words", "told"), [([], "nobody competes"), (["x"], "write NAME=FOLDER")])
def test_what_cannot_compete_is_refused_in_a_sentence(words: list[str], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        entered(None, words)


def test_a_mode_that_is_none_is_refused(base: str) -> None:
    with pytest.raises(OptionError, match=r"\+lookup or \+inline"):
        joined(base, {"streams": "folder+backwards"})


def test_a_method_may_have_rates_of_its_own(base: str) -> None:
    model, _ = load(base, streams=None)
    found = trainees(model, ["medusa", "eagle=1e-4"], [1e-3, 1e-2], 2, TrainOptions(iters=1))
    assert [t.name for t in found] == ["medusa 0.001", "medusa 0.01", "eagle 0.0001"]
    with pytest.raises(OptionError, match="learning rates 'x'"):
        trainees(model, ["eagle=x"], [1e-3], 2, TrainOptions(iters=1))
    with pytest.raises(OptionError, match="'lion' is not known"):
        trainees(model, ["lion"], [1e-3], 2, TrainOptions(iters=1))
