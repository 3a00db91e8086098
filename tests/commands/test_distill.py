"""Self-distillation: each answer is the model's own, whatever shares its batch; kills cost nothing."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import pytest

from mlx_specstream.commands import distill
from mlx_specstream.errors import OptionError, OutputError
from mlx_specstream.loading.load import load
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.cache import KVCache
from mlx_specstream.train.answers import BatchDecoder, Waiting
from mlx_specstream.train.data import Record, record_tokens
from mlx_specstream.train.starter import starter_records
from tests.support.engine import small_model

PROMPTS = [Waiting(i, [(3 * i + k) % 12 for k in range(2 + i % 4)]) for i in range(9)]


def alone(backbone: Backbone, prompt: list[int], max_tokens: int, stop: set[int]) -> list[int]:
    cache, tokens, answer = KVCache(backbone.num_layers), prompt, []
    while len(answer) < max_tokens and not (answer and answer[-1] in stop):
        hidden = backbone.forward(mx.array(tokens), cache)
        cache.advance(len(tokens))
        tokens = [int(mx.argmax(backbone.logits(hidden)[-1]).item())]
        answer += tokens
    return answer


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_answers_are_the_models_own(family) -> None:
    backbone = Backbone(small_model(family))
    stop = {alone(backbone, PROMPTS[0].tokens, 5, set())[3]}
    decoder = BatchDecoder(backbone, batch_size=3, max_tokens=7, stop=stop)
    found = dict(decoder.answers(PROMPTS))
    assert found == {p.index: alone(backbone, p.tokens, 7, stop) for p in PROMPTS}
    assert len({len(answer) for answer in found.values()}) > 1


def test_sampled_answers_do_not_depend_on_the_batch() -> None:
    backbone = Backbone(small_model())
    runs = [
        dict(BatchDecoder(backbone, size, 6, {11}, temp=0.9, top_p=0.9, seed=4).answers(order))
        for size, order in ((2, PROMPTS), (5, PROMPTS[::-1]))
    ]
    assert runs[0] == runs[1]
    other = dict(BatchDecoder(backbone, 4, 6, {11}, temp=0.9, seed=5).answers(PROMPTS))
    assert other != runs[0]


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
    texts = [record.fields["prompt"] for record in starter_records()]
    assert len(set(texts)) == len(texts) == 200
    assert not any("{" in text for text in texts)
    out = tmp_path / "own.jsonl"
    words = ["--model", tiny_folder, "--data", "starter", "--output", out, "--num-prompts", "3"]
    assert distill.main([*map(str, words), "--max-tokens", "4"]) == 0
    lines = out.read_text().splitlines()
    assert sorted(json.loads(line)["messages"][0]["content"] for line in lines) == sorted(texts[:3])
