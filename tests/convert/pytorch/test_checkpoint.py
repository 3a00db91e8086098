"""Schema 1, written and read."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from mlx_specstream.convert.pytorch.checkpoint import (  # noqa: E402
    CONFIG_NAME,
    WEIGHTS_NAME,
    load_checkpoint,
    save_checkpoint,
)
from mlx_specstream.errors import CheckpointError  # noqa: E402


@pytest.fixture
def saved(tmp_path, make_backbone, make_adapters):
    backbone = make_backbone()
    parts = {"conditioner_rank": 4, "conditioner_hidden": 8, "conditioner_tokens": 2}
    ranks = {"pruner_rank": 2, "stream_init_rank": 2, "next_token_rank": 2}
    adapters = make_adapters(backbone, **parts, **ranks)
    save_checkpoint(tmp_path / "out", adapters, "someone/base", extra_files={"note.txt": "hello"})
    return tmp_path / "out", backbone, adapters


def test_round_trip(saved):
    path, backbone, adapters = saved
    loaded = load_checkpoint(path, backbone)
    assert loaded.config == adapters.config
    for name, parameter in adapters.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    assert (path / "note.txt").read_text() == "hello"


def test_names_and_config_are_schema_1(saved):
    path, _, adapters = saved
    config = json.loads((path / CONFIG_NAME).read_text())
    assert (config["schema"], config["base_model_name_or_path"]) == (1, "someone/base")
    tensors = safetensors.load_file(path / WEIGHTS_NAME)
    name = "base_model.model.model.layers.3.self_attn.k_proj.lora_A.weight"
    assert tensors[name].shape == (4, 48)
    assert tensors["stream_embeddings.weight"].shape == (3, 48)
    assert tensors["conditioner.mlp_in.weight"].shape == (8, 144)
    assert tensors["next_token.lora_B.weight"].shape == (48, 2)
    assert len(tensors) == len(list(adapters.parameters()))


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "schema", "absent"])
def test_damage_is_one_clear_sentence(saved, damage):
    path, backbone, _ = saved
    tensors = safetensors.load_file(path / WEIGHTS_NAME)
    if damage == "missing":
        tensors.pop("stream_embeddings.weight")
    elif damage == "unknown":
        tensors["surprise"] = torch.zeros(1)
    elif damage == "shape":
        tensors["stream_embeddings.weight"] = torch.zeros(3, 47)
    elif damage == "schema":
        config = json.loads((path / CONFIG_NAME).read_text())
        (path / CONFIG_NAME).write_text(json.dumps({**config, "schema": 9}))
    else:
        (path / CONFIG_NAME).unlink()
    safetensors.save_file(tensors, path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError):
        load_checkpoint(path, backbone)
