"""Loading a model with its streams, and every way that can go wrong in one sentence."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_specstream import load, stream_generate
from mlx_specstream.errors import ModelError, OptionError, SpecStreamError, StreamsError
from mlx_specstream.loading.load import StreamModel
from mlx_specstream.weights import shipped
from tests.support import tiny
from tests.support.scripted import save_random_streams


@pytest.fixture(scope="module")
def streams_folder(tiny_llama: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_streams(tmp_path_factory.mktemp("streams") / "adapter", tiny_llama)


@pytest.fixture
def own_streams(streams_folder: Path, tmp_path: Path) -> Path:
    """A copy of the streams to damage."""
    return Path(shutil.copytree(streams_folder, tmp_path / "own"))


@pytest.fixture
def own_model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model to damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def one_sentence(error: SpecStreamError) -> str:
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".")
    return text


# -- what is found ------------------------------------------------------------------------------


def test_a_model_without_streams_decodes_plainly(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model, tokenizer = load(str(tiny_folder))
    assert isinstance(model, StreamModel)
    assert model.streams is None
    assert "no streams" in caplog.text
    *_, last = stream_generate(model, tokenizer, "hi", max_tokens=4)
    assert last.stats.drafted == 0


def test_streams_none_says_nothing(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(str(tiny_folder), streams=None)[0].streams is None
    assert not caplog.text


def test_an_adapter_folder(tiny_folder: Path, streams_folder: Path) -> None:
    model, tokenizer, config = load(str(tiny_folder), return_config=True, streams=streams_folder)
    assert model.streams is not None
    assert model.streams_name == str(streams_folder)
    assert config["model_type"] == "llama"
    *_, last = stream_generate(model, tokenizer, "hi", max_tokens=4)
    assert last.stats.drafted > 0


def test_the_model_folder_holds_them(own_model: Path, tiny_llama: nn.Module) -> None:
    save_random_streams(own_model, tiny_llama)
    assert load(str(own_model))[0].streams is not None


@pytest.mark.parametrize(("mode", "taken"), [("lossless", True), ("shared", False)])
def test_a_shipped_set_is_found_by_its_base(
    mode: str,
    taken: bool,
    tiny_folder: Path,
    tiny_llama: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_random_streams(tmp_path / "a-other", tiny.tiny_model(seed=9))
    save_random_streams(tmp_path / "tiny-chat", tiny_llama, mode=mode)
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path)
    assert shipped.shipped_names() == ["a-other", "tiny-chat"]
    assert (load(str(tiny_folder))[0].streams is not None) is taken
    assert load(str(tiny_folder), streams="tiny-chat")[0].streams is not None
    with pytest.raises(StreamsError, match="another base model"):
        load(str(tiny_folder), streams="a-other")


# -- streams that cannot be used ----------------------------------------------------------------


def test_streams_of_another_base(tiny_folder: Path, tmp_path: Path) -> None:
    other = save_random_streams(tmp_path / "s", tiny.tiny_model(seed=5))
    with pytest.raises(StreamsError, match="belong to another base model") as caught:
        load(str(tiny_folder), streams=other)
    one_sentence(caught.value)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"version": 99}, "version 99 is not known"),
        ({"colour": "blue"}, "unknown field 'colour'"),
        ({"num_streams": 0}, "num_streams must be at least 1"),
        ({"num_streams": 33}, "num_streams must be at most 32"),
        ({"num_streams": 3}, "stream_embeddings is of shape"),
        ({"num_msa_layers": 0}, "num_msa_layers must be at least 1"),
        ({"num_msa_layers": 4}, "is missing"),
        ({"num_msa_layers": 9}, "is missing"),
        ({"mode": "lossy"}, "mode must be"),
    ],
)
def test_streams_configs_that_make_no_sense(
    fields: dict[str, Any], sentence: str, tiny_folder: Path, own_streams: Path
) -> None:
    change_json(own_streams / "streams_config.json", **fields)
    with pytest.raises(StreamsError, match=sentence) as caught:
        load(str(tiny_folder), streams=own_streams)
    one_sentence(caught.value)


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_truncated_streams(keep: int, tiny_folder: Path, own_streams: Path) -> None:
    weights = own_streams / "streams.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(StreamsError) as caught:
        load(str(tiny_folder), streams=own_streams)
    one_sentence(caught.value)


def test_missing_halves(tiny_folder: Path, own_streams: Path, own_model: Path) -> None:
    shutil.copy(own_streams / "streams.safetensors", own_model)
    (own_streams / "streams.safetensors").unlink()
    for arguments in ({"path_or_hf_repo": str(tiny_folder), "streams": own_streams},):
        with pytest.raises(StreamsError):
            load(**arguments)
    with pytest.raises(StreamsError, match=r"holds no streams_config\.json"):
        load(str(own_model))


def test_streams_nobody_has(tiny_folder: Path, tmp_path: Path, no_hub: None) -> None:
    file = tmp_path / "file"
    file.touch()
    for name, sentence in {
        "nothing": "there are no streams 'nothing'",
        "owner/name": "no streams of that name could be fetched .*no route to host",
        str(file): "is a file, but streams are a folder",
        str(tmp_path): "holds no streams_config.json",
    }.items():
        with pytest.raises(StreamsError, match=sentence) as caught:
            load(str(tiny_folder), streams=name)
        one_sentence(caught.value)


# -- models that cannot be used -----------------------------------------------------------------


def test_models_nobody_has(tmp_path: Path, no_hub: None) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    for name, sentence in {
        "owner/nothing": "no model of that name could be fetched .*no route to host",
        str(file): "is a file, but a model is a folder",
        str(tmp_path): "holds no config.json",
    }.items():
        with pytest.raises(ModelError, match=sentence) as caught:
            load(name)
        one_sentence(caught.value)


@pytest.mark.parametrize("keep", [0, 7, 300, -1, -5000])
def test_truncated_weights(keep: int, own_model: Path) -> None:
    weights = own_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load(str(own_model))
    one_sentence(caught.value)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model_type": "unheard-of"}, "cannot be loaded.*unheard-of"),
        ({"num_hidden_layers": 5}, "cannot be loaded"),
        ({"model_file": "run_me.py"}, "code of its own"),
    ],
)
def test_model_configs_that_make_no_sense(
    fields: dict[str, Any], sentence: str, own_model: Path
) -> None:
    (own_model / "run_me.py").write_text("raise SystemExit('ran')")
    change_json(own_model / "config.json", **fields)
    with pytest.raises(ModelError, match=sentence) as caught:
        load(str(own_model))
    one_sentence(caught.value)


def test_a_tokenizers_code_is_not_run(own_model: Path) -> None:
    (own_model / "run_me.py").write_text("raise SystemExit('ran')")
    auto_map = {"AutoTokenizer": ["run_me.Tokenizer", "run_me.Tokenizer"]}
    change_json(own_model / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Tokenizer")
    try:
        load(str(own_model))
    except ModelError as error:
        one_sentence(error)
    with pytest.raises(OptionError, match="never runs code"):
        load(str(own_model), tokenizer_config={"trust_remote_code": True})


def test_weights_that_are_not_numbers(own_model: Path) -> None:
    weights = mx.load(str(own_model / "model.safetensors"))
    assert isinstance(weights, dict)
    weights["model.norm.weight"] = weights["model.norm.weight"] * mx.nan
    mx.save_safetensors(str(own_model / "model.safetensors"), weights)
    with pytest.raises(ModelError, match="not a number"):
        load(str(own_model))


def test_the_demo_is_float16_on_a_gpu(
    tiny_folder: Path, streams_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams are cast with it; a model of the user's own stays as it is."""
    monkeypatch.setattr("mlx_specstream.loading.load.on_gpu", lambda: True)
    own, _ = load(str(tiny_folder), streams=str(streams_folder))
    assert own.backbone.dtype == mx.float32
    monkeypatch.setattr("mlx_specstream.loading.folders.resolve_demo", lambda: tiny_folder)
    demo, tokenizer = load("demo", streams=str(streams_folder))
    assert demo.backbone.dtype == mx.float16
    assert demo.streams is not None
    assert {a.dtype for a in demo.streams.arrays} - {mx.bool_} == {mx.float16}
    *_, last = stream_generate(demo, tokenizer, "hi", max_tokens=8)
    assert last.stats.drafted > 0
    monkeypatch.setattr("mlx_specstream.loading.load.on_gpu", lambda: False)
    assert load("demo", streams=None)[0].backbone.dtype == mx.float32
