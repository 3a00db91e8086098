"""Every training entry point, end to end on a tiny model: one run, its resume, and what comes after it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mlx_specstream.convert.pytorch import distill, evaluate, task, train, trainer  # noqa: E402
from mlx_specstream.convert.pytorch.backbone import TorchBackbone  # noqa: E402
from mlx_specstream.convert.pytorch.checkpoint import load_checkpoint  # noqa: E402
from mlx_specstream.convert.pytorch.states import state_files  # noqa: E402
from mlx_specstream.errors import DataError, OptionError  # noqa: E402
from mlx_specstream.weights.files import refuse_same_file  # noqa: E402
from mlx_specstream.weights.shipped import SHIPPED  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SMALL = [
    "--num-streams",
    "3",
    "--num-msa-layers",
    "2",
    "--lora-rank",
    "4",
    "--lora-alpha",
    "8",
    "--lr",
    "1e-2",
    "--conditioner-rank",
    "4",
    "--conditioner-hidden",
    "8",
    "--positions",
    "24",
    "--num-frequent",
    "16",
    "--num-random",
    "24",
    "--held-out",
    "4",
    "--warmup",
    "2",
    "--dtype",
    "float32",
    "--save-dtype",
    "float32",
]


def paths(work: Path, data: str, output: str) -> list[str]:
    return f"--model {work / 'model'} --data {work / data} --output {work / output}".split()


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A model folder with a word tokenizer, prompts, and the model's own answers with their states."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from tests.convert.pytorch.conftest import VOCAB, tiny_backbone

    path = tmp_path_factory.mktemp("work")
    words = {f"w{i}": i for i in range(VOCAB)}
    words |= {"<unk>": 0, "<user>": 1, "<eos>": 2, "<assistant>": 3}
    words = {word: i for word, i in words.items() if word[0] == "<" or i > 3}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<eos>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path / "model")
    tiny_backbone().model.save_pretrained(path / "model")
    lines = [json.dumps({"prompt": f"w{i} w{i * 7 % 90 + 4}"}) for i in range(4, 34)]
    (path / "prompts.jsonl").write_text("\n".join(lines))
    options = ["--max-tokens", "12", "--batch-size", "8", "--dtype", "float32"]
    assert distill.main([*paths(path, "prompts.jsonl", "own.jsonl"), *options]) == 0
    return path


def run(work: Path, output: str, *options: str) -> list[dict]:
    assert train.main([*paths(work, "own.jsonl", output), *SMALL, *options]) == 0
    return read_lines(work / output / "train_log.jsonl")


def test_a_run_its_exact_resume_and_what_follows(work):
    log = run(work, "whole", "--steps", "12", "--save-seconds", "0")
    assert [record["step"] for record in log if "conditioned_loss" in record] == list(range(1, 13))
    held_out = log[-1]["held_out"]
    assert held_out["marginal_chain"] >= 1
    assert held_out["conditioned_chain"] >= 1

    class StopError(Exception):
        pass

    original = trainer.TorchTrainer.step

    def step(self, batch):
        if self.progress.update == 7:
            raise StopError
        return original(self, batch)

    trainer.TorchTrainer.step = step
    try:
        with pytest.raises(StopError):
            run(work, "halves", "--steps", "12", "--save-seconds", "0")
    finally:
        trainer.TorchTrainer.step = original
    assert not (work / "halves").exists()
    log = run(work, "halves", "--steps", "12", "--save-seconds", "0")
    assert [record["step"] for record in log if "conditioned_loss" in record] == list(range(1, 13))
    backbone = TorchBackbone.load(work / "model")
    whole, halves = (load_checkpoint(work / name, backbone) for name in ("whole", "halves"))
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, halves.get_parameter(name)), name

    start = ["--start-from", str(work / "whole"), "--steps", "3"]
    log = run(work, "grown", *start, "--num-streams", "5")
    assert len(log[0]["loss"]) == 5
    known = ["--next-token-rank", "2", "--conditioner-tokens", "2"]
    run(work, "known", *start, *known)
    knowing = load_checkpoint(work / "known", backbone)
    assert knowing.next_token.lora_B.weight.abs().max() > 0
    assert knowing.conditioner.mlp_in.weight[:, -48:].abs().max() > 0
    log = run(work, "pruner", *start, "--train", "pruner", "--pruner-rank", "2")
    assert "top1" in log[-1]["held_out"]
    pruned = load_checkpoint(work / "pruner", backbone)
    assert torch.equal(pruned.stream_embeddings, whole.stream_embeddings)
    assert pruned.pruner.lora_B.weight.abs().max() > 0
    options = f"--checkpoint {work / 'whole'} --rows 4 16 --dtype float32".split()
    assert evaluate.main([*paths(work, "own.jsonl", "figures.json"), *options]) == 0
    found = json.loads((work / "figures.json").read_text())
    for kind in ("marginal", "conditioned"):
        chain, wide = found[f"{kind} chain"], found[f"{kind} 16 rows"]
        assert 1 <= chain["all_positions"] <= wide["all_positions"] <= 4


def test_shared_mode_trains_main_too(work):
    options = [
        "--mode",
        "shared",
        "--steps",
        "4",
        "--conditioner-rank",
        "0",
        "--eval-fraction",
        "1",
    ]
    log = run(work, "shared", *options)
    assert "main_loss" in log[0]
    assert 0 <= log[-1]["held_out"]["main_top1"] <= 1
    adapters = load_checkpoint(work / "shared", TorchBackbone.load(work / "model"))
    assert adapters.delta(0, "self_attn.q_proj").lora_B.weight.abs().max() > 0


def test_shared_mode_from_lossless_streams_and_its_yardstick(work):
    start = ["--start-from", str(work / "lossless"), "--mode", "shared", "--resize-rank", "6"]
    run(work, "lossless", "--steps", "2")
    log = run(work, "joint", *start, "--steps", "4", "--group-size", "4", "--fraction", "1")
    assert {"main_loss", "loss", "conditioned_loss"} <= log[0].keys()
    assert log[-1]["held_out"]["conditioned_chain"] >= 1
    plain = run(work, "plain", "--train", "plain", "--steps", "16", "--conditioner-rank", "0")
    losses = [record["main_loss"] for record in plain[:16]]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert "loss" not in plain[0]

    schema = "CREATE TABLE w5 (w6 TEXT);\n\nQuestion: "
    gold = [{"prompt": schema + q, "completion": "SELECT w6 FROM w5"} for q in ("w7 w8", "w9")]
    (work / "gold.jsonl").write_text("\n".join(map(json.dumps, gold)))
    options = ["--dtype", "float32", "--max-tokens", "6"]
    for name, extra in {"joint": [], "plain": ["--plain"]}.items():
        options = ["--checkpoint", str(work / name), "--dtype", "float32", "--max-tokens", "6"]
        options += [*extra, "--figures", str(work / f"{name}.json")]
        assert task.main([*paths(work, "gold.jsonl", f"{name}_own.jsonl"), *options]) == 0
        assert json.loads((work / f"{name}.json").read_text())["prompts"] == 2
    options = f"--checkpoint {work / 'joint'} --rows 4 --dtype float32".split()
    assert evaluate.main([*paths(work, "joint_own.jsonl", "joint_steps.json"), *options]) == 0
    assert json.loads((work / "joint_steps.json").read_text())["conditioned chain"]["walking"] >= 1


@pytest.mark.parametrize("mode", ["lossless", "shared"])
def test_streams_may_run_in_every_layer(work, mode):
    options = ["--num-msa-layers", "4", "--mode", mode, "--steps", "2"]
    log = run(work, f"every-{mode}", *options)
    assert log[-1]["held_out"]["conditioned_chain"] >= 1
    adapters = load_checkpoint(work / f"every-{mode}", TorchBackbone.load(work / "model"))
    assert adapters.first_msa_layer == 0
    assert adapters.delta(0, "self_attn.q_proj").lora_B.weight.abs().max() > 0


def test_states_of_more_layers_than_there_are_are_refused(work, tmp_path):
    options = ["--states", str(tmp_path / "states"), "--num-msa-layers"]
    for number in ("0", "5"):
        with pytest.raises(OptionError, match=f"--num-msa-layers is {number}, and the model has 4"):
            distill.main([*paths(work, "prompts.jsonl", "x.jsonl"), *options, number])
    assert not (work / "x.jsonl").exists()


def test_a_time_budget_ends_the_run(work):
    log = run(work, "timed", "--max-minutes", "0.02")
    assert log[-2]["lr_factor"] < 1
    assert log[-1]["elapsed_s"] >= 1.2


@pytest.mark.slow
def test_two_processes_make_the_step_of_one(work):
    alone = run(work, "alone", "--steps", "3")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    options = [*paths(work, "own.jsonl", "pair"), *SMALL, "--steps", "3"]
    command = [sys.executable, *launcher, "mlx_specstream.convert.pytorch.train", *options]
    root = Path(train.__file__).resolve().parents[2]
    places = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
    pair = read_lines(work / "pair" / "train_log.jsonl")
    for one, two in zip(alone[:3], pair[:3], strict=True):
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)


def recipe(text: str) -> list[list[str]]:
    """Return the words of the commands in `text`, from the module's name on."""
    lines = text.replace("\\\n", " ").splitlines()
    return [
        shlex.split(line.partition("mlx_specstream.convert.pytorch.")[2])
        for line in lines
        if "mlx_specstream.convert.pytorch." in line
    ]


def test_the_recipe_runs_as_written(work, monkeypatch):
    folder = work / "recipe"
    folder.mkdir()
    monkeypatch.chdir(folder)
    shutil.copy(work / "prompts.jsonl", folder)
    shutil.copytree(work / "model", "DIR")
    commands = recipe(train.__doc__)
    assert [words[0] for words in commands[:2]] == ["distill", "train"]
    layers = ["--num-msa-layers", "2"]
    assert distill.main([*commands[0][1:], *layers, "--max-tokens", "12"]) == 0
    assert {path.name for path in folder.glob("*.jsonl")} > {"own.jsonl", "states.jsonl"}
    short = ["--max-minutes", "0", "--steps", "2", "--dtype", "bfloat16"]
    assert train.main([*commands[1][1:], *SMALL, *layers, *short]) == 0
    assert (folder / "OUT" / "stream_model.safetensors").exists()


def test_recipes_of_cards_name_no_file_twice():
    cards = SHIPPED.glob("*/README.md")
    found = [words for card in cards for words in recipe(card.read_text()) if words[0] == "distill"]
    assert len(found) > 1
    for words in found:
        options = {words[i]: words[i + 1] for i in range(1, len(words) - 1) if words[i][:2] == "--"}
        states = state_files(options["--states"]) if "--states" in options else ()
        refuse_same_file(
            {"--data": options["--data"], "--output": options["--output"], "--states": states}
        )


@pytest.mark.parametrize(
    "clash", ["answers and states", "prompts and answers", "prompts and states"]
)
def test_answers_and_states_never_share_a_file(work, tmp_path, clash):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "w5"}\n')
    output, states = {
        "answers and states": (tmp_path / "own.jsonl", tmp_path / "own"),
        "prompts and answers": (data, tmp_path / "states"),
        "prompts and states": (tmp_path / "own.jsonl", tmp_path / "data"),
    }[clash]
    options = f"--model {work / 'model'} --data {data} --output {output} --states {states}"
    with pytest.raises(OptionError, match="would use the same file"):
        distill.main(options.split())
    assert data.read_text() == '{"prompt": "w5"}\n'
    with pytest.raises(DataError, match="is no index of base states"):
        run(work, "never", "--steps", "1", "--states", str(work / "own"))


def test_a_pruner_needs_streams(work):
    with pytest.raises(OptionError, match="--start-from"):
        train.main([*paths(work, "own.jsonl", "none"), *SMALL, "--train", "pruner"])


def test_a_budget_is_a_number_of_minutes(work):
    with pytest.raises(OptionError, match="--max-minutes"):
        train.main([*paths(work, "own.jsonl", "none"), *SMALL, "--max-minutes", "nan"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--lr", "-1"], "--lr must be at least 0"),
        (["--fraction", "2"], "--fraction must be at most 1"),
        (["--num-msa-layers", "5"], "is more than the model's 4 layers"),
        (["--held-out", "1000"], "no text to train on"),
    ],
)
def test_what_cannot_be_trained_is_said_in_this_trainers_words(work, words, message):
    with pytest.raises((OptionError, DataError), match=message):
        train.main([*paths(work, "own.jsonl", "none"), *SMALL, *words])


def test_a_run_of_an_earlier_version_is_not_continued(work):
    kept = work / "old.partial-train"
    kept.mkdir()
    torch.save({"progress": {"step": 3, "epoch": 0, "batch": 3}}, kept / "state.pt")
    with pytest.raises(OptionError, match="begun with an earlier version"):
        run(work, "old", "--steps", "5")
    assert (kept / "state.pt").exists()
