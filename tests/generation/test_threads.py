"""What one thread loads another may decode with; two may do so at once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_specstream import DecodeConfig, batch_generate, generate, load
from mlx_specstream.config import TreeSpec
from mlx_specstream.speculation.adapters import StreamLinear
from mlx_specstream.weights.drafter import save_drafter
from tests.support import tiny
from tests.support.drafters import KINDS, drafter_config, random_drafter_tensors
from tests.support.scripted import save_random_streams
from tests.support.together import launch

HEADS = {"head_dim": 32}  # so that rows divide into groups of 32
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"speculative": False},
    "chain": {"config": DecodeConfig(TreeSpec.parse("chain"))},
    "tree": {"config": DecodeConfig(TreeSpec(rows=8))},
    "inline": {"config": DecodeConfig(TreeSpec(rows=8), schedule="inline")},
    "auto": {},
    "kv_bits": {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0},
    "look-up": {"config": DecodeConfig(drafts=("lookup",))},
    "both": {"config": DecodeConfig(TreeSpec(rows=8), drafts=("streams", "lookup"))},
}
PROMPT = list(b"again a prompt, and again a prompt, and")
IN_A_THREAD = """
import os, sys, threading
from tests.generation.test_threads import text_of
from mlx_specstream import load
model, tokenizer = load(sys.argv[1], draft_model=sys.argv[3] or None, pipeline=True)
thread = threading.Thread(target=lambda: print(text_of(model, tokenizer, sys.argv[2]), flush=True))
thread.start()
thread.join()
os._exit(0)  # MLX's own clean-up at exit may abort, whatever was computed
"""


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tiny.save_tiny_model(tmp_path_factory.mktemp("threads") / "shared", **HEADS)
    return str(save_random_streams(path, tiny.tiny_model("llama", **HEADS), mode="shared"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tiny.save_tiny_model(tmp_path_factory.mktemp("threads") / "tiny", **HEADS)
    return str(save_random_streams(path, tiny.tiny_model("llama", **HEADS)))


def text_of(model: Any, tokenizer: Any, way: str) -> list[int]:
    if way == "batch":
        answers = batch_generate(model, tokenizer, [PROMPT], max_tokens=8).answers
        return answers[0].token_ids
    text = generate(model, tokenizer, PROMPT, max_tokens=8, **WAYS[way])
    return [ord(letter) for letter in text]


def in_thread(work: Callable[[], Any]) -> Any:
    """Return what `work` returns in a thread of its own."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("way", [*WAYS, "batch"])
def test_a_fresh_thread_decodes_what_the_main_one_loaded(folder: str, way: str) -> None:
    decodes_in_a_fresh_thread(folder, way)


@pytest.mark.parametrize("way", ["chain", "inline", "auto"])
def test_a_fresh_thread_decodes_in_shared_mode(shared_folder: str, way: str) -> None:
    decodes_in_a_fresh_thread(shared_folder, way)


@pytest.mark.parametrize("way", ["chain", "both", "batch"])
def test_a_fresh_thread_decodes_with_streams_that_know_the_next_token(
    tmp_path: Path, way: str
) -> None:
    """As `specstream adopt` makes them."""
    folder = tiny.save_tiny_model(tmp_path / "tiny", **HEADS)
    model = tiny.tiny_model("llama", **HEADS)
    fields = {"next_token_rank": 3, "conditioner_tokens": 2}
    decodes_in_a_fresh_thread(str(save_random_streams(folder, model, **fields)), way)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_thread_decodes_with_what_else_drafts(
    folder: str, tmp_path: Path, kind: str
) -> None:
    draft = tmp_path / "draft"
    if kind == "draft model":
        tiny.save_tiny_model(draft, "qwen3", seed=3, num_hidden_layers=2)
    else:
        config = drafter_config(kind, 64, 256, 4)
        tensors = random_drafter_tensors(config)
        save_drafter(draft, config, tensors, base_model="tiny", fingerprint=None)
    decodes_in_a_fresh_thread(folder, "tree", str(draft))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_fresh_thread_decodes_a_model_whose_rotations_are_a_table(
    tmp_path: Path, processes: int
) -> None:
    """mlx-lm makes it with the model, and it is no parameter; a model in parts is not run on loading."""
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0}
    more = {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    changes = {**HEADS, "rope_scaling": {**scaling, **more}}
    folder = tiny.save_tiny_model(tmp_path / "tiny", **changes)
    save_random_streams(folder, tiny.tiny_model("llama", **changes))
    if processes == 1:
        decodes_in_a_fresh_thread(str(folder), "tree")
        return
    model, tokenizer = load(str(folder))
    wanted = str(text_of(model, tokenizer, "tree"))
    for status, out, errors in launch(processes, ["-c", IN_A_THREAD, str(folder), "tree", ""]):
        assert (status, out.strip()) == (0, wanted), errors[-500:]


def decodes_in_a_fresh_thread(folder: str, way: str, draft: str = "") -> None:
    """In a process of its own, whose main thread has decoded nothing: MLX aborts it if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", IN_A_THREAD, folder, way, draft], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]
    model, tokenizer = load(folder, draft_model=draft or None)
    assert done.stdout.strip().splitlines()[-1] == str(text_of(model, tokenizer, way))


def test_the_main_thread_decodes_what_another_loaded(folder: str) -> None:
    model, tokenizer = in_thread(lambda: load(folder))
    texts = [text_of(model, tokenizer, way) for way in ("plain", "chain", "tree", "auto", "batch")]
    assert texts[0]
    assert all(text[:8] == texts[0][:8] for text in texts[:4])


def test_threads_take_turns_with_one_model(folder: str) -> None:
    model, tokenizer = load(folder)
    wanted = text_of(model, tokenizer, "plain")
    for way in ("tree", "inline", "tree"):
        assert in_thread(lambda way=way: text_of(model, tokenizer, way)) == wanted


@pytest.mark.parametrize("mode", ["lossless", "shared"])
def test_threads_decode_with_one_model_at_the_same_moment(
    folder: str, shared_folder: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every thread its own text, as if it were alone, also where each adapter lets others run."""
    model, tokenizer = load(folder if mode == "lossless" else shared_folder)
    ways = ["tree", "inline", "chain", "inline"]
    if mode == "lossless":
        ways += ["plain", "kv_bits"]
    wanted = [text_of(model, tokenizer, way) for way in ways]
    start = threading.Barrier(len(ways))
    found: dict[int, list[list[int]]] = {}

    def work(number: int) -> None:
        start.wait()
        found[number] = [text_of(model, tokenizer, ways[number]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(ways))]
    apply = StreamLinear.__call__

    def let_others_run(self: StreamLinear, x: mx.array) -> mx.array:
        time.sleep(1e-5)
        return apply(self, x)

    monkeypatch.setattr(StreamLinear, "__call__", let_others_run)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(number) for number in range(len(ways))] == [[text] * 3 for text in wanted]


def test_where_streams_begin_is_each_threads_own(folder: str) -> None:
    model, _ = load(folder)
    assert model.streams is not None
    split = model.streams.split
    split.num_main = 5
    assert in_thread(lambda: split.num_main) == 0
    in_thread(lambda: setattr(split, "num_main", 7))
    assert split.num_main == 5
