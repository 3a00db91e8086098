"""`specstream adopt`: a tiny model gets streams of its own, stopped and killed wherever it likes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import quantize_model, save_model

from mlx_specstream import cli, load
from mlx_specstream.apps.learning import Learner, learned_file
from mlx_specstream.commands import adopt as adopt_command
from mlx_specstream.commands.adoption import measures, plan, stages
from mlx_specstream.commands.adoption.plan import (
    ANSWER_BATCHES,
    ENOUGH,
    MOST_ANSWERING,
    USUAL_ANSWER,
    Rates,
    share_out,
)
from mlx_specstream.commands.adoption.prompts import PART_LETTERS, parts_of, records_for
from mlx_specstream.commands.adoption.state import STATE_FILE, alone
from mlx_specstream.train import trainer
from mlx_specstream.train.prompt_kinds import kind_records
from mlx_specstream.verify import compare, replay
from mlx_specstream.weights.checkpoint import load_streams
from mlx_specstream.weights.fingerprint import fingerprint
from tests.support import tiny
from tests.support.scripted import save_random_streams

QUICK = ("--minutes", "0.05", "--yes")


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SPECSTREAM_STATE", str(tmp_path / "state"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every stage do little."""
    monkeypatch.setattr(stages, "ENOUGH", 12)
    monkeypatch.setattr(stages, "ANSWER_TOKENS", 24)
    monkeypatch.setattr(measures, "TOKENS", 12)
    monkeypatch.setattr(measures, "plan_costs", lambda _: {})
    monkeypatch.setattr(stages, "JUDGED_PROMPTS", 1)
    monkeypatch.setattr(stages, "JUDGED_TOKENS", 8)
    for name, value in {"TRIAL_PROMPTS": 4, "TRIAL_TOKENS": 6}.items():
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr(trainer, "draw_own_curve", lambda _: None)


def adopt(*words: object) -> int:
    return cli.main(["adopt", *map(str, words)])


def installed() -> list[Path]:
    return sorted((Path(os.environ["SPECSTREAM_STATE"]) / "streams").glob("[!.]*"))


def work() -> Path:
    (folder,) = (Path(os.environ["SPECSTREAM_CACHE"]) / "adopt").iterdir()
    return folder


@pytest.mark.usefixtures("quick")
def test_a_model_is_adopted_and_used_by_itself(tiny_folder, capsys) -> None:
    assert adopt(tiny_folder, *QUICK) == 0
    said = capsys.readouterr().out
    assert "It needs about" in said
    (streams,) = installed()
    last = said.strip().splitlines()[-1]
    assert "tokens per pass as a chain" in last
    assert "as fast as mlx-lm here" in last
    assert str(streams) in last
    assert "by themselves" in last
    names = {path.name for path in streams.iterdir()}
    assert names >= {"streams.safetensors", "streams_config.json", "acceptance.json", "README.md"}
    assert "prune_threshold" in load_streams(streams).metadata
    card = (streams / "README.md").read_text()
    assert "tokens per pass, chain" in card
    assert "x mlx-lm" in card
    for name in ("README.md", "streams_config.json"):
        assert str(tiny_folder.parent) not in (streams / name).read_text()
    assert {path.name for path in work().iterdir()} == {".lock", "answers.jsonl"}

    config = load_streams(streams).config
    assert (config.next_token_rank, config.conditioner_tokens, config.pruner_rank) == (64, 2, 8)
    assert "has streams already" not in said
    model, tokenizer = load(str(tiny_folder))
    assert model.streams_name == str(streams)
    prompt = list(b"Where is the harbour?")
    runs = [replay(model, tokenizer, prompt, 24, way) for way in (None, measures.DecodeConfig())]
    assert compare(model, tokenizer, prompt, *runs).verdict == "identical"


@pytest.mark.usefixtures("quick")
def test_streams_serve_copies_of_their_base_and_no_other_model(
    tiny_folder, tmp_path, tiny_llama
) -> None:
    assert adopt(tiny_folder, *QUICK) == 0
    (streams,) = installed()
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    assert load(str(copy))[0].streams_name == str(streams)
    other = tiny.save_tiny_model(tmp_path / "other", seed=7)
    assert load(str(other))[0].streams is None
    # Those in a copy's own folder come before those made for another copy of its base.
    save_random_streams(copy, tiny_llama)
    assert load(str(copy))[0].streams_name == str(copy)
    save_random_streams(streams / "own", tiny_llama)
    shutil.copy(streams / "own" / "streams.safetensors", streams / "other.bin")
    (streams / "streams_config.json").write_text("{")
    assert load(str(tiny_folder))[0].streams is None


def test_without_a_terminal_and_a_yes_nothing_begins(tiny_folder, capsys) -> None:
    assert adopt(tiny_folder, "--minutes", "1") == 2
    error = capsys.readouterr().err
    assert "there is no terminal to ask on; add --yes" in error
    assert error.count("\n") == 1
    assert not (work() / STATE_FILE).exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name the model to adopt"),
        (("m", "--minutes", "0"), "--minutes must be above 0"),
        (("m", "--minutes", "1e9"), "at most 100,000"),
        (("m", "--minutes", "nan"), "got nan"),
        (("nowhere/at/all", "--yes"), "does not exist"),
        (("m", "--forget"), "leave out the model"),
        (("{tiny}", "--yes", "--continue"), "there are no streams for"),
        (("{tiny}", "--yes", "--documents", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("{tiny}", "--yes", "--prompts", "nowhere.jsonl"), "nowhere.jsonl"),
        (("{tiny}", "--yes", "--adapter-path", "nowhere"), "nowhere does not exist"),
    ],
)
def test_what_it_refuses_it_says_in_a_sentence(tiny_folder, capsys, words, said) -> None:
    assert adopt(*(word.format(tiny=tiny_folder) for word in words)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert installed() == []


@pytest.mark.usefixtures("quick")
def test_other_options_do_not_continue_what_is_under_way(tiny_folder, monkeypatch, capsys) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(measures, "verify", stop)
        assert adopt(tiny_folder, *QUICK) == 130
    assert installed() == []
    assert adopt(tiny_folder, "--minutes", "9", "--yes") == 2
    assert "--minutes was 0.05 and is now 9.0" in capsys.readouterr().err
    assert adopt(tiny_folder, *QUICK) == 0
    assert "Going on: plan, answers, training, acceptance done" in capsys.readouterr().out
    assert len(installed()) == 1


def stop_at(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: object) -> None:
    """Adopt, and be interrupted where everything is learnt and nothing measured."""

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(measures, "record_acceptance", stop)
        assert adopt(folder, *QUICK, *words) == 130


@pytest.mark.usefixtures("quick")
def test_a_model_that_has_changed_is_not_taken_for_what_it_was(
    tiny_folder, tmp_path, monkeypatch, capsys
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    stop_at(monkeypatch, folder)
    weights = mx.load(str(folder / "model.safetensors"))
    name = "model.layers.2.mlp.up_proj.weight"
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights | {name: 1.01 * weights[name]})
    capsys.readouterr()
    assert adopt(folder, *QUICK) == 2
    error = capsys.readouterr().err
    assert "has changed since its adoption began" in error
    assert error.count("\n") == 1
    assert adopt(folder, "--restart", *QUICK) == 0
    assert len(installed()) == 1


@pytest.mark.usefixtures("quick")
def test_a_folder_that_holds_something_is_never_replaced(
    tiny_folder, tmp_path, monkeypatch, capsys
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("words")
    assert adopt(tiny_folder, "--output", mine, *QUICK) == 2
    assert "exists already and is left as it is" in capsys.readouterr().err
    # ... nor one that was filled while the work went on.
    output = tmp_path / "out"
    stop_at(monkeypatch, tiny_folder, "--output", output, "--restart")
    output.mkdir()
    (output / "other.txt").write_text("words")
    assert adopt(tiny_folder, "--output", output, *QUICK) == 2
    assert "exists already" in capsys.readouterr().err
    (output / "other.txt").unlink()
    assert adopt(tiny_folder, "--output", output, *QUICK) == 0
    assert (mine / "thesis.txt").read_text() == "words"


@pytest.mark.usefixtures("quick")
def test_killed_while_it_installs_it_installs_again(tiny_folder, tmp_path, monkeypatch) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "out"
    with monkeypatch.context() as stopped:
        stopped.setattr(adopt_command, "clear", stop)
        assert adopt(tiny_folder, "--output", output, *QUICK) == 130
    assert load_streams(output).config.num_streams == 4
    assert adopt(tiny_folder, "--output", output, *QUICK) == 0
    assert load_streams(output).config.num_streams == 4


def test_where_nothing_can_be_written_no_work_is_done(
    tiny_folder, tmp_path, monkeypatch, capsys
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert adopt(tiny_folder, "--output", file / "streams", *QUICK) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert adopt(tiny_folder, "--output", file, *QUICK) == 2
    assert "is a file" in capsys.readouterr().err
    monkeypatch.setenv("SPECSTREAM_STATE", str(file / "state"))
    assert adopt(tiny_folder, *QUICK) == 2
    assert "cannot be written" in capsys.readouterr().err
    monkeypatch.setenv("SPECSTREAM_CACHE", str(file / "cache"))
    assert adopt(tiny_folder, *QUICK) == 2
    error = capsys.readouterr().err
    assert "SPECSTREAM_CACHE" in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("quick")
def test_a_disk_that_fills_up_stops_it_in_a_sentence(tiny_folder, monkeypatch, capsys) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[write] Unable to write 14877 bytes to file.")  # MLX's words

    with monkeypatch.context() as filled:
        filled.setattr(mx, "save_safetensors", full)
        assert adopt(tiny_folder, *QUICK) == 2
    error = capsys.readouterr().err
    assert "the disk is probably full" in error
    assert "Traceback" not in error
    assert installed() == []
    assert adopt(tiny_folder, *QUICK) == 0
    assert "Going on: plan, answers done" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_shared_training_on_streams_that_cannot_be_shared_is_refused_before_any_work(
    tiny_folder, tmp_path, capsys
) -> None:
    copy = shutil.copytree(tiny_folder, tmp_path / "model")
    assert adopt(copy, *QUICK) == 0
    (work() / "answers.jsonl").unlink()
    capsys.readouterr()
    assert adopt(copy, "--continue", "--mode", "shared", *QUICK) == 2
    assert "streams of shared mode cannot" in capsys.readouterr().err
    assert not (work() / "answers.jsonl").exists()


@pytest.mark.usefixtures("quick")
def test_what_is_too_long_to_ask_is_said(tiny_folder, tmp_path, monkeypatch, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xef\xbb\xbf" + b"A mark stands before this text.\n\n" + b"x" * 9000)
    stop_at(monkeypatch, tiny_folder, "--documents", text)
    assert "prompts of more than" in capsys.readouterr().out
    asked = [
        json.loads(line)["messages"][0]["content"] for line in (work() / "answers.jsonl").open()
    ]
    assert any(content.endswith("\n\nA mark stands before this text.") for content in asked)
    assert not any("xxx" in content for content in asked)


def test_two_at_once_do_not_adopt_the_same_model(tiny_folder, capsys) -> None:
    assert adopt(tiny_folder, "--minutes", "1") == 2  # makes the folder
    with alone(work()):
        assert adopt(tiny_folder, *QUICK) == 2
    assert "another process is adopting this model" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_answers_that_differ_keep_streams_out_of_use(tiny_folder, monkeypatch, capsys) -> None:
    class Wrong:
        verdict, divergence = "mismatch", "token 3"

    monkeypatch.setattr(measures, "compare", lambda *_: Wrong)
    assert adopt(tiny_folder, *QUICK) == 2
    assert "not put to use" in capsys.readouterr().err
    assert installed() == []


@pytest.mark.usefixtures("quick")
def test_streams_that_training_further_made_worse_are_not_installed(
    tiny_folder, tiny_llama, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(stages, "WORSE", 100.0)
    copy = shutil.copytree(tiny_folder, tmp_path / "model")
    save_random_streams(copy, tiny_llama)
    assert adopt(copy, "--continue", *QUICK) == 2
    assert "made the streams worse" in capsys.readouterr().err
    assert installed() == []


@pytest.mark.usefixtures("quick")
def test_more_training_takes_in_what_was_kept(
    tiny_folder, tiny_llama, tmp_path, monkeypatch, capsys
) -> None:
    copy = shutil.copytree(tiny_folder, tmp_path / "model")
    save_random_streams(copy, tiny_llama)
    _, tokenizer = load(str(tiny_folder))
    learner = Learner(learned_file(str(copy), copy), tokenizer)
    for number in range(30):
        learner.keep(list(f"question {number}?".encode()), [100 + number] * 12)
    with learner.path.open("ab") as file:
        file.write(b'{"cut')
    monkeypatch.setattr(stages, "WORSE", 0.0)  # random streams may get worse by chance
    assert adopt(copy, "--continue", *QUICK) == 0
    out = capsys.readouterr()
    told = [line for line in out.out.splitlines() if "texts with" in line]
    assert told, out
    trained = int(told[0].split()[0])
    own = work() / "answers.jsonl"  # written if the machine is fast enough to train on more
    answers = len(own.read_text().splitlines()) if own.exists() else 0
    assert trained == 27 + answers  # three of those kept are held out to judge by
    assert "{" not in (installed()[0] / "README.md").read_text()
    assert not (work() / "learned.jsonl").exists()


@pytest.mark.usefixtures("quick")
def test_four_bits_an_adapter_and_documents(tmp_path, monkeypatch) -> None:
    """A quantised base with LoRA adapters of mlx-lm, asked about the user's own text."""
    folder = tiny.save_tiny_model(tmp_path / "m")
    model = tiny.tiny_model()
    config = json.loads((folder / "config.json").read_text())
    model, config = quantize_model(model, config, 32, 4)
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    shape = {"rank": 2, "scale": 2.0, "dropout": 0.0}
    linear_to_lora_layers(model, 4, shape)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    told = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": shape}
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    key = mx.random.key(3)
    weights = {
        name: 0.05 * mx.random.normal(tensor.shape, key=key)
        for name, tensor in tree_flatten(model.trainable_parameters())
        if "lora" in name
    }
    mx.save_safetensors(str(adapter / "adapters.safetensors"), weights)
    document = tmp_path / "mine.txt"
    document.write_text("The harbour opens at eight.\n\nIt closes at six.")
    assert adopt(folder, "--adapter-path", adapter, "--documents", document, *QUICK) == 0
    loaded, _ = load(str(folder), adapter_path=str(adapter))
    assert loaded.streams_name == str(installed()[0])
    assert "self_attn.q_proj" in loaded.streams.config.target_modules
    asked = [json.loads(line)["messages"] for line in (work() / "answers.jsonl").open()]
    assert any("The harbour opens" in messages[0]["content"] for messages in asked)


@pytest.mark.usefixtures("quick")
def test_shared_streams_are_made_but_never_taken_unasked(tiny_folder, tmp_path, capsys) -> None:
    assert adopt(tiny_folder, "--mode", "shared", *QUICK) == 0
    (streams,) = installed()
    assert f"use them with --streams {streams}" in capsys.readouterr().out
    assert load_streams(streams).config.mode == "shared"
    assert load(str(tiny_folder))[0].streams is None
    output = tmp_path / "mine"
    assert adopt(tiny_folder, "--output", output, *QUICK) == 0
    assert load_streams(output).config.mode == "lossless"
    assert installed() == [streams]


@pytest.mark.slow
def test_killed_at_every_stage_it_goes_on(tiny_folder, tmp_path) -> None:
    """SIGKILL after and inside each stage; nothing is installed before the end, which comes."""
    command = [sys.executable, "-m", "mlx_specstream", "adopt", str(tiny_folder), *QUICK]
    places = (tmp_path / "cache", tmp_path / "state")
    env = {**os.environ, "SPECSTREAM_CACHE": str(places[0]), "SPECSTREAM_STATE": str(places[1])}

    def done() -> list[str]:
        for path in places[0].glob(f"adopt/*/{STATE_FILE}"):
            return list(json.loads(path.read_text())["done"])
        return []

    moments = [
        lambda: "plan" in done(),
        lambda: any(path.stat().st_size for path in places[0].glob("adopt/*/answers.jsonl")),
        lambda: "answers" in done(),
        lambda: list(places[0].glob("adopt/*/training/training_state.safetensors")),
        lambda: "training" in done(),
        lambda: "acceptance" in done(),
        lambda: "verification" in done(),
    ]
    killed = 0
    for moment in moments:
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
        while process.poll() is None and not moment():
            time.sleep(0.02)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            assert installed() == []
    assert killed >= 5
    assert subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=False).returncode == 0
    assert len(installed()) == 1
    assert load(str(tiny_folder))[0].streams_name == str(installed()[0])


def test_the_built_in_prompts_are_many_different_and_mixed() -> None:
    records = kind_records()
    texts = [record.fields["prompt"] for record in records]
    assert len(set(texts)) == len(texts) > 4000
    assert not any("{" in text or "}" in text for text in texts)
    assert texts == [record.fields["prompt"] for record in kind_records()]
    kinds = [record.source for record in records[:100]]
    assert set(kinds) >= {"chat", "code", "maths", "sql", "summary", "translation", "languages"}
    assert all(kinds.count(kind) == 10 for kind in set(kinds))


def test_documents_are_cut_into_parts_between_paragraphs(tmp_path) -> None:
    paragraphs = [f"{number} " + "word " * (40 * number) for number in range(1, 12)]
    parts = list(parts_of("\n\n".join(paragraphs)))
    assert all(len(part) <= PART_LETTERS for part in parts)
    assert "".join("".join(parts).split()) == "".join("".join(paragraphs).split())
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(paragraphs))
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "mine"}\n')
    first, second, *_ = records_for(str(own), [str(path)])
    assert first.fields["prompt"] == "mine"
    assert second.fields["prompt"].endswith(parts[0])


@pytest.mark.parametrize("seconds", [3.0, 900.0, 3600.0, 36000.0])
@pytest.mark.parametrize(("answers", "positions"), [(140, 32), (5, 1), (20, 500), (5000, 3)])
def test_the_minutes_are_shared_out(seconds, answers, positions) -> None:
    rates = Rates(answers, positions, 10**9, 2_000_000, side_by_side=1000)
    found = share_out(rates, seconds)
    total = found.answer_s + found.train_s + found.measure_s
    least_s = ENOUGH * USUAL_ANSWER / answers
    if found.answer_s == pytest.approx(least_s):
        assert total >= seconds * (1 - 1e-9)  # as long as it must
        return
    assert found.answer_s > least_s
    assert total == pytest.approx(seconds)
    assert found.answer_s <= found.train_s + 1e-9
    # Where the bound is not met, training sees every answered position once.
    if found.answer_s / (found.answer_s + found.train_s) < MOST_ANSWERING - 1e-9:
        assert answers * found.answer_s == pytest.approx(positions * found.train_s)
    known = share_out(rates, seconds, known_tokens=10**9)
    assert known.answer_s == 0
    low, high = ANSWER_BATCHES
    assert low <= found.answer_batch <= high
    # Never more side by side than the memory holds.
    assert share_out(replace(rates, side_by_side=3), seconds).answer_batch == 3


def test_a_base_is_known_through_its_adapters(tiny_llama: nn.Module) -> None:
    model = tiny.tiny_model()
    linear_to_lora_layers(model, 4, {"rank": 2, "scale": 2.0, "dropout": 0.0})
    assert fingerprint(model) == fingerprint(tiny_llama)
