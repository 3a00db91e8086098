"""Self-distillation: each answer is the model's own, whatever shares its batch; kills cost nothing."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import pytest

from mlx_specstream.commands import distill
from mlx_specstream.errors import OptionError, OutputError
from mlx_specstream.loading.load import load
from mlx_specstream.train.builtin_prompts import builtin_records
from mlx_specstream.train.data import Record, record_tokens


def answers_of(output) -> dict[int, dict]:
    return {r["index"]: r for r in map(json.loads, output.read_text().splitlines())}


def test_greedy_answers_are_the_models_own(tiny_folder, tmp_path) -> None:
    data, output = tmp_path / "prompts.jsonl", tmp_path / "own.jsonl"
    data.write_text(
        "\n".join(json.dumps({"prompt": "say" * (1 + i % 4) + str(i)}) for i in range(9))
    )
    command = ["--model", str(tiny_folder), "--data", str(data), "--output", str(output)]
    assert distill.main([*command, "--max-tokens", "7", "--batch-size", "3"]) == 0
    model, tokenizer = load(str(tiny_folder), streams=None)
    for record in answers_of(output).values():
        tokens = list(record["prompt_ids"])
        while len(tokens) < len(record["prompt_ids"] + record["answer_ids"]):
            tokens.append(int(mx.argmax(model.model(mx.array([tokens]))[0, -1]).item()))
        assert tokens == record["prompt_ids"] + record["answer_ids"]
        assert len(record["answer_ids"]) == 7 or tokens[-1] in tokenizer.eos_token_ids


def test_sampled_answers_do_not_depend_on_the_batch(tiny_folder, tmp_path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": "say " * (9 - i)}) for i in range(6)))
    command = ["--model", str(tiny_folder), "--data", str(data), "--max-tokens", "6"]
    command += ["--temp", "0.9", "--top-p", "0.9"]
    runs = []
    for number, options in enumerate((("2", "4"), ("5", "4"), ("5", "5"))):
        output = tmp_path / f"own{number}.jsonl"
        words = ["--batch-size", options[0], "--seed", options[1], "--output", str(output)]
        if number == 1:  # what was answered before changes nothing of the rest
            lines = (tmp_path / "own0.jsonl").read_text().splitlines(keepends=True)
            output.write_text("".join(lines[:2]))
        assert distill.main([*command, *words]) == 0
        runs.append({i: r["answer_ids"] for i, r in answers_of(output).items()})
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_stopped_run_continues(tiny_folder, tmp_path, capsys) -> None:
    data, output = tmp_path / "prompts.jsonl", tmp_path / "own.jsonl"
    data.write_text(
        "\n".join(json.dumps({"prompt": f"say {i}"}) for i in range(4))
        + '\n{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    )
    command = ["--model", str(tiny_folder), "--data", str(data), "--output", str(output)]
    command += ["--max-tokens", "6", "--batch-size", "2"]
    assert distill.main(command) == 0
    whole = {r["index"]: r for r in map(json.loads, output.read_text().splitlines())}
    assert sorted(whole) == list(range(5))
    assert whole[4]["messages"][0] == {"role": "user", "content": "a"}
    assert all(r["messages"][-1]["role"] == "assistant" for r in whole.values())

    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:2]) + lines[2][:20])  # as a kill leaves it
    capsys.readouterr()
    assert distill.main(command) == 0
    assert "5 prompts, 2 answered already" in capsys.readouterr().out
    again = {r["index"]: r for r in map(json.loads, output.read_text().splitlines())}
    assert again == whole


def test_a_model_without_a_chat_template_takes_the_bare_text(tiny_folder, tmp_path) -> None:
    folder, data, output = tmp_path / "base", tmp_path / "in.jsonl", tmp_path / "own.jsonl"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("chat_template*"))
    data.write_text('{"prompt": "say"}\n')
    command = ["--model", str(folder), "--data", str(data), "--output", str(output)]
    assert distill.main([*command, "--max-tokens", "4"]) == 0
    (record,) = map(json.loads, output.read_text().splitlines())
    assert record["prompt_ids"] == list(b"say")
    _, tokenizer = load(str(folder), streams=None)
    written = Record({"prompt": "say", "completion": "so"}, "here")
    assert record_tokens(written, tokenizer) == ([*b"sayso", 255], 3)
    assert record_tokens(written, tokenizer, mask_prompt=False) == ([*b"sayso", 255], 0)


def test_bad_options_and_foreign_files(tmp_path) -> None:
    output = tmp_path / "own.jsonl"
    command = ["--model", "m", "--data", "d", "--output", str(output)]
    with pytest.raises(OptionError, match="--max-tokens must be at least 1"):
        distill.main([*command, "--max-tokens", "0"])
    output.write_text('{"text": "mine"}\n')
    with pytest.raises(OutputError, match="was not written by specstream distill"):
        distill.main(command)
    assert output.read_text() == '{"text": "mine"}\n'


def test_starter_prompts_are_two_hundred_different_ones(tiny_folder, tmp_path, capsys) -> None:
    texts = [record.fields["prompt"] for record in builtin_records()]
    assert len(set(texts)) == len(texts) == 200
    assert not any("{" in text for text in texts)
    out = tmp_path / "own.jsonl"
    words = ["--model", tiny_folder, "--data", "starter", "--output", out, "--num-prompts", "3"]
    assert distill.main([*map(str, words), "--max-tokens", "4"]) == 0
    lines = out.read_text().splitlines()
    assert sorted(json.loads(line)["messages"][0]["content"] for line in lines) == sorted(texts[:3])
