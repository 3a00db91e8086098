"""Prompt caches on disk: ours in mlx-lm, mlx-lm's in ours, and what cannot be used refused."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import load_prompt_cache as mlx_lm_load
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.cache import save_prompt_cache as mlx_lm_save

from mlx_specstream import cli
from mlx_specstream.commands import cache_prompt
from mlx_specstream.config import CacheConfig, DecodeConfig
from mlx_specstream.errors import DataError, OptionError
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.cache import RotatingLayer, from_mlx_lm
from mlx_specstream.model.cache.files import load_prompt_cache, save_prompt_cache
from mlx_specstream.model.cache.quantized import Quantization
from tests.support import tiny
from tests.support.engine import (
    decode,
    mlx_lm_tokens,
    random_streams,
    small_model,
    stream_config,
    table_decoder,
)
from tests.support.tiny_models import tiny_random_model

PROMPT = [int(t) % 12 for t in range(3, 40, 2)]
QUANTISED = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}


@pytest.mark.parametrize("kind", ["plain", "rotating", "quantised"])
def test_either_goes_on_from_the_others_file(tmp_path: Path, kind: str) -> None:
    model = small_model(layers=3, seed=1, head_dim=32)
    streams = random_streams(model, stream_config(), 1)
    config = {
        "plain": CacheConfig(),
        "rotating": CacheConfig(max_kv_size=9),
        "quantised": CacheConfig(**QUANTISED),  # type: ignore[arg-type]
    }[kind]
    options: dict[str, Any] = QUANTISED if kind == "quantised" else {}
    ours = streams.backbone.new_cache(config)
    first = decode(table_decoder(streams, DecodeConfig()), PROMPT, 6, cache=ours)
    path = tmp_path / "ours.safetensors"
    save_prompt_cache(path, ours, "a model")
    theirs, metadata = mlx_lm_load(str(path), return_metadata=True)
    assert metadata["model"] == "a model"
    assert {cache.offset for cache in theirs} == {ours.length}
    wanted = mlx_lm_tokens(model, [first.tokens[-1], 5], 12, prompt_cache=theirs, **options)

    back, _ = load_prompt_cache(path, [None] * 3)
    assert [type(layer) for layer in back.layers] == [type(layer) for layer in ours.layers]
    prompt = [first.tokens[-1], 5]
    found = decode(table_decoder(streams, DecodeConfig()), prompt, 12, cache=back)
    assert found.tokens[:12] == wanted


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    with pytest.raises(DataError, match="there is no prompt cache"):
        load_prompt_cache(path, [None])
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="not a prompt cache"):
        load_prompt_cache(path, [None])
    mx.save_safetensors(str(path), {"a": mx.zeros((3,))})
    with pytest.raises(DataError, match="not a prompt cache"):
        load_prompt_cache(path, [None])
    model = small_model(layers=3, seed=1, head_dim=32)
    caches = make_prompt_cache(model)
    mlx_lm_tokens(model, PROMPT, 2, prompt_cache=caches, **QUANTISED)
    mlx_lm_save(str(path), caches)
    with pytest.raises(OptionError, match="has 3 layers and the model 2"):
        load_prompt_cache(path, [None] * 2)
    with pytest.raises(OptionError, match="has 8 bits in groups of 32"):
        load_prompt_cache(path, [None] * 3, Quantization(4, 32))
    with pytest.raises(OptionError, match=r"is a .safetensors file"):
        save_prompt_cache(tmp_path / "cache.npz", streams_cache(), "a model")
    assert not (tmp_path / "cache.npz").exists()


def streams_cache() -> Any:
    streams = random_streams(small_model(layers=3), stream_config())
    return streams.backbone.new_cache()


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(list(words)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def mlx_lms(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str, *words: str
) -> str:
    monkeypatch.setattr(sys, "argv", [verb, *words])
    importlib.import_module(f"mlx_lm.{verb}").main()
    return capsys.readouterr().out


def test_the_verbs_read_each_others_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny.save_tiny_model(tmp_path / "tiny", "qwen3"))
    ours, theirs = str(tmp_path / "ours.safetensors"), str(tmp_path / "theirs.safetensors")
    words = ("--model", folder, "--prompt", "a long text to ask about", "--max-kv-size", "16")
    told = said(capsys, "cache_prompt", *words, "--prompt-cache-file", ours)
    mlx_lms(monkeypatch, capsys, "cache_prompt", *words, "--prompt-cache-file", theirs)
    mine, _ = load_prompt_cache(ours, [None] * 4)
    other, _ = load_prompt_cache(theirs, [None] * 4)
    assert mine.length == other.length
    assert f"{mine.length} tokens" in told
    for a, b in zip(mine.layers, other.layers, strict=True):
        assert isinstance(a, RotatingLayer)
        assert mx.allclose(a.read(mine.length)[0], b.read(mine.length)[0], atol=1e-4)
    ask = ("--model", folder, "--prompt", "a question", "--max-tokens", "12", "--verbose", "F")
    answers = {
        said(capsys, "generate", *ask, "--prompt-cache-file", file).strip("\n")
        for file in (ours, theirs)
    } | {
        mlx_lms(monkeypatch, capsys, "generate", *ask, "--prompt-cache-file", file).strip("\n")
        for file in (ours, theirs)
    }
    assert len(answers) == 1
    assert len(answers.pop()) > 3
    elsewhere = str(tiny.save_tiny_model(tmp_path / "other", "qwen3"))
    assert cli.main(["generate", "--model", elsewhere, "-p", "x", "--prompt-cache-file", ours]) == 2
    assert "was made with the model" in capsys.readouterr().err


def test_words_are_checked_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cache_prompt", "--model", "nowhere", "--prompt", "x", "--prompt-cache-file", "x.npz"]
    assert cli.main(words) == 2
    assert "must end in .safetensors" in capsys.readouterr().err
    assert cache_prompt.build_parser().prog == "specstream cache_prompt"


def test_layers_without_attention_have_no_cache_of_mlx_lms(tmp_path: Path) -> None:
    backbone = Backbone(tiny_random_model("nemotron-nas"))
    cache = backbone.new_cache()
    with pytest.raises(OptionError, match="has 3 layers and the model 4"):
        from_mlx_lm(make_prompt_cache(backbone.model), backbone.windows)
    backbone.forward(mx.array([1, 2, 3]), cache)
    cache.advance(3)
    with pytest.raises(OptionError, match="layers without attention"):
        save_prompt_cache(tmp_path / "x.safetensors", cache, "m")
    assert list(tmp_path.iterdir()) == []
