"""The study of slow messages: a model that can be divided says the same, and delays arrive."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from benchmarks.even_heads import make_even
from benchmarks.messages import compiled, main, table
from mlx_specstream import stream_generate
from mlx_specstream.loading.load import load
from mlx_specstream.weights.checkpoint import save_streams
from mlx_specstream.weights.fingerprint import fingerprint
from tests.support.engine import stream_config
from tests.support.random_streams import random_tensors
from tests.support.tiny import save_tiny_model
from tests.support.together import launch

SUMS = """
import ctypes, time
import mlx.core as mx

group, row = mx.distributed.init(), mx.zeros((8,))
delay = ctypes.c_long.in_dll(ctypes.CDLL(None), "message_delay_ns")
for delay.value in (0, 20_000_000):
    begun = time.perf_counter()
    for _ in range(5):
        mx.eval(mx.distributed.all_sum(row + 1, group=group))
    print(time.perf_counter() - begun)
"""


@pytest.fixture
def odd(tmp_path: Path) -> tuple[Path, Path]:
    """A model with 6 heads on 3, which two processes cannot divide, and its streams."""
    heads = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}
    folder = save_tiny_model(tmp_path / "odd", eos_token_id=None, **heads)
    model, _ = load(str(folder), streams=None)
    config = stream_config(num_streams=3, num_msa_layers=2)
    tensors = random_tensors(model.backbone, config)
    own = fingerprint(model.model)
    save_streams(tmp_path / "joined", config, tensors, base_model=None, fingerprint=own)
    return folder, tmp_path / "joined"


def test_even_heads_compute_the_same_function(odd: tuple[Path, Path], tmp_path: Path) -> None:
    even = make_even(tmp_path / "even", *odd)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    logits, said = [], []
    for folder, streams in (odd, even):
        model, tokenizer = load(str(folder), streams=str(streams))
        logits.append(model(mx.array([prompt])))
        answer = list(stream_generate(model, tokenizer, prompt, max_tokens=24))
        said.append(([r.token for r in answer], answer[-1].stats.accepted))
    assert model.model.args.num_key_value_heads == 4
    assert mx.abs(logits[0] - logits[1]).max().item() < 1e-4
    assert said[0] == said[1]


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="late.c is for Linux"
)
def test_every_sum_is_late_by_the_delay(tmp_path: Path) -> None:
    late = compiled(tmp_path)
    ended = launch(2, ["-c", SUMS], environment={"LD_PRELOAD": str(late)})
    quick, slow = map(float, ended[0][1].split())
    assert slow - quick > 5 * 0.035  # two messages of 20 ms that wait for each other


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="late.c is for Linux"
)
def test_the_study_runs(
    odd: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, streams = make_even(tmp_path / "even", *odd)
    monkeypatch.setenv("SPECSTREAM_CACHE", str(tmp_path))
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    output = tmp_path / "found.json"
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n## What was tried\n\nMuch.\n", encoding="utf-8")
    words = ["--model", str(model), "--streams", str(streams), "--delays", "0,500"]
    words += ["--max-tokens", "8", "--plan-seconds", "0.5", "--seconds", "1"]
    words += ["--output", str(output), "--page", str(page)]
    assert main(words) == 0
    found = json.loads(output.read_text("utf-8"))
    assert [row["delay_us"] for row in found["rows"]] == [0, 500]
    assert all(row["messages"] == 8 and row["speedup"] for row in found["rows"])
    assert found["rows"][1]["message_us"] >= 500
    sections = page.read_text("utf-8").split("## ")
    assert sections[1].startswith("What slow messages do\n")
    assert table(found) in sections[1]
    assert sections[2] == "What was tried\n\nMuch.\n"
    assert table(found) in capsys.readouterr().out
