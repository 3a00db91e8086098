"""`specstream train` from the command line: a run, what it says, and what it refuses."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from mlx_specstream import cli
from mlx_specstream.train.state import load_state
from mlx_specstream.weights.checkpoint import load_streams
from tests.support.together import launch

QUICK = ["--iters", "4", "--batch-size", "3", "--num-layers", "2", "--lora-rank", "2"]
QUICK += ["--conditioner-rank", "2", "--conditioner-hidden", "4", "--warmup", "1"]
QUICK += ["--verdict-prompts", "1", "--verdict-tokens", "4"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    records = [{"prompt": f"say {i}", "completion": "abcabcabc" * (1 + i % 2)} for i in range(12)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def run(*words: object) -> int:
    return cli.main(["train", *map(str, words)])


def test_a_run_and_what_follows_it(tiny_folder, data, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    common = ["--model", tiny_folder, "--data", data, "--adapter-path", out, *QUICK]
    assert run(*common) == 0
    said = capsys.readouterr().out
    assert "train: 12 examples." in said
    assert "an update" in said
    assert "GB of memory at the peak" in said
    assert "tokens per step on held-out prompts" in said
    assert load_streams(out).config.num_msa_layers == 2
    assert (out / "learning_curve.png").exists() or not pytest.importorskip("matplotlib")

    assert run(*common, "--resume") == 0
    assert "holds a finished run" in capsys.readouterr().out
    assert run(*common) == 2
    assert "is not empty" in capsys.readouterr().err

    more = tmp_path / "more"
    again = ["--model", tiny_folder, "--data", data, "--adapter-path", more, *QUICK]
    assert run(*again, "--resume-adapter-file", out, "--iters", "1", "--num-streams", "9") == 0
    assert load_streams(more).config == load_streams(out).config


@pytest.mark.parametrize("mode", ["lossless", "shared"])
def test_streams_may_run_in_every_layer(tiny_folder, data, tmp_path, mode) -> None:
    out = tmp_path / "out"
    words = ["--model", tiny_folder, "--data", data, "--adapter-path", out, *QUICK]
    assert run(*words, "--num-layers", "4", "--mode", mode) == 0
    streams = load_streams(out)
    assert streams.config.num_msa_layers == 4
    assert all(
        mx.any(streams.tensors[f"layers.{i}.self_attn.q_proj.lora_b"] != 0) for i in range(4)
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num-msa-layers", "5"], "is more than the model's 4 layers"),
        (["--target-modules", "self_attn.x"], "names 'self_attn.x', which not all of the model"),
        (["--learning-rate", "0"], "--learning-rate must be above 0"),
        (["--iters", "0"], "--iters must be at least 1, got 0"),
        (["--conditioner-rank", "0"], "are both 0 or both not"),
        (["--max-seq-length", "8"], "two completion tokens within 8 tokens"),
        (["--data", "nowhere"], "there is no data at nowhere"),
        (["--resume-adapter-file", "nowhere"], "holds no streams_config.json"),
        (["-c", "nowhere.yaml"], "cannot be read"),
        (["--part", "pruner"], "--part pruner needs --resume-adapter-file"),
        (["--part", "pruner", "--mode", "shared"], "leave out --mode shared"),
    ],
)
def test_what_it_refuses_it_says_in_a_sentence(
    tiny_folder, data, tmp_path, capsys, words, said
) -> None:
    out = tmp_path / "out"
    assert run("--model", tiny_folder, "--data", data, "--adapter-path", out, *QUICK, *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("specstream: ")
    assert error.count("\n") == 1
    assert not out.exists()


def test_options_from_yaml(tmp_path) -> None:
    from mlx_specstream.commands.train import build_parser, options_of
    from mlx_specstream.errors import OptionError

    path = tmp_path / "run.yaml"
    path.write_text("iters: 7\nlearning-rate: 0.01\nmask_prompt: false\n")
    words = ["--model", "m", "--data", "d", "-c", str(path), "--preset", "paper"]
    options = options_of(build_parser().parse_args([*words, "--iters", "9"]))
    assert (options.iters, options.learning_rate, options.mask_prompt) == (9, 0.01, False)
    assert options.lora_rank == 8
    for text, said in (
        ("itters: 3", "unknown option 'itters'"),
        ("iters: many", "expected a value"),
    ):
        path.write_text(text)
        with pytest.raises(OptionError, match=said):
            options_of(build_parser().parse_args(words))


def test_a_full_disk_leaves_the_last_checkpoint(
    tiny_folder, data, tmp_path, capsys, monkeypatch
) -> None:
    out, saves = tmp_path / "out", []
    real = mx.save_safetensors

    def save(path: str, *rest, **named) -> None:
        saves.append(1)
        if len(saves) > 2:
            raise RuntimeError("[write] Unable to write: No space left on device")
        real(path, *rest, **named)

    monkeypatch.setattr(mx, "save_safetensors", save)
    common = ["--model", tiny_folder, "--data", data, "--adapter-path", out, *QUICK]
    assert run(*common, "--save-every", "1") == 2
    assert "the disk is full" in capsys.readouterr().err
    monkeypatch.undo()
    assert load_state(out).progress.update == 2
    assert run(*common, "--save-every", "1", "--resume") == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no training records; give at least one"),
        ("\n\n", "holds no training records; give at least one"),
        ('{"prompt": "a", "completion": ""}\n', "none of the 1 records has two completion tokens"),
        ('{"prompt": "a", "completion": "bcd"}\n{"prompt": \n', "line 2 is not valid JSON"),
    ],
)
def test_data_that_gives_nothing_is_named(tiny_folder, tmp_path, capsys, text, said) -> None:
    path, out = tmp_path / "data.jsonl", tmp_path / "out"
    path.write_text(text)
    assert run("--model", tiny_folder, "--data", path, "--adapter-path", out, *QUICK) == 2
    error = capsys.readouterr().err
    assert said in error
    assert str(path) in error
    assert not out.exists()


def test_two_processes_share_the_texts(tiny_folder, data, tmp_path) -> None:
    words = ["-m", "mlx_specstream", "train", "--model", str(tiny_folder), "--data", data, *QUICK]
    leader, follower = launch(2, [*words, "--adapter-path", str(tmp_path / "two")], timeout=600)
    assert (leader[0], follower[0]) == (0, 0), leader[2]
    assert "tokens per step on held-out prompts" in leader[1]
    assert follower[1] == ""
    run("--model", tiny_folder, "--data", data, *QUICK, "--adapter-path", tmp_path / "one")
    one, two = (load_streams(tmp_path / name).tensors for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(mx.abs(one[name] - two[name]).max().item() < 2e-3 for name in one)


def test_another_drafter_is_trained_by_one_process(tiny_folder, data, tmp_path) -> None:
    words = ["-m", "mlx_specstream", "train", "--model", str(tiny_folder), "--data", data]
    words += ["--drafter", "medusa", "--adapter-path", str(tmp_path / "out")]
    ended = launch(2, words, timeout=600)
    assert [status for status, _, _ in ended] == [2, 2]
    assert "--drafter is trained by one process" in ended[0][2]
