"""Stream files: what is written is read back bit for bit; everything else is one sentence."""

import json
import random
import struct

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import llama

from mlx_specstream.config import StreamConfig
from mlx_specstream.errors import SpecStreamError, StreamsError
from mlx_specstream.weights.checkpoint import load_streams, save_streams
from mlx_specstream.weights.fingerprint import base_dims, fingerprint, same_base
from mlx_specstream.weights.stream_tensors import stream_shapes


def tiny_base(seed=0, width=64, layers=4):
    mx.random.seed(seed)
    return llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=width,
            num_hidden_layers=layers,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=128,
        )
    )


def full_config(**changes):
    fields = {
        "num_streams": 3,
        "num_msa_layers": 2,
        "stream_init_rank": 2,
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "target_modules": ("self_attn.q_proj", "mlp.down_proj"),
        "pruner_rank": 2,
        "conditioner_rank": 4,
        "conditioner_hidden": 8,
    }
    return StreamConfig(**{**fields, **changes})


def random_tensors(config, dims, dtype=mx.float32, **kinds):
    shapes = stream_shapes(config, dims, **kinds)
    return {name: mx.random.normal(shape).astype(dtype) for name, shape in shapes.items()}


@pytest.fixture
def saved(tmp_path):
    model, config = tiny_base(), full_config()
    tensors = random_tensors(config, base_dims(model))
    folder = tmp_path / "streams"
    save_streams(folder, config, tensors, base_model="a/b", fingerprint=fingerprint(model))
    return folder, model, config, tensors


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_round_trip_is_bit_exact(tmp_path, dtype):
    model, config = tiny_base(), full_config()
    tensors = random_tensors(config, base_dims(model), dtype)
    found = fingerprint(model)
    save_streams(
        tmp_path / "a", config, tensors, base_model="x", fingerprint=found, metadata={"k": "v"}
    )
    loaded = load_streams(tmp_path / "a")
    assert loaded.config == config
    assert (loaded.base.name, loaded.base.fingerprint) == ("x", found)
    assert loaded.metadata == {"k": "v"}
    assert set(loaded.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == dtype
        assert mx.array_equal(loaded.tensors[name], tensor)
    loaded.check_base(model)


def test_shared_mode_may_have_gates_and_lower_layers(tmp_path):
    model, config = tiny_base(), full_config(mode="shared")
    tensors = random_tensors(config, base_dims(model), all_layers=True, gates=True)
    assert tensors["layers.3.stream_gate"].shape == (4,)
    save_streams(tmp_path / "a", config, tensors, base_model=None, fingerprint=None)
    load_streams(tmp_path / "a").check_base(model)
    tensors.pop("layers.0.mlp.down_proj.lora_a")
    with pytest.raises(StreamsError, match=r"layers.0.mlp.down_proj.lora_a .* is missing"):
        save_streams(tmp_path / "b", config, tensors, base_model=None, fingerprint=None)
    assert not (tmp_path / "b").exists()


def test_saving_beside_a_model_keeps_its_files_and_replaces_both(saved):
    folder, _model, config, tensors = saved
    (folder / "model.safetensors").write_bytes(b"x")
    tensors = {name: 2 * tensor for name, tensor in tensors.items()}
    save_streams(folder, config, tensors, base_model=None, fingerprint=None)
    assert mx.array_equal(load_streams(folder).tensors["pruner.lora_a"], tensors["pruner.lora_a"])
    assert (folder / "model.safetensors").read_bytes() == b"x"
    assert len(list(folder.iterdir())) == 3


def test_two_saves_mixed_are_noticed(saved, tmp_path):
    folder, _model, config, tensors = saved
    other = {name: -tensor for name, tensor in tensors.items()}
    save_streams(tmp_path / "other", config, other, base_model=None, fingerprint=None)
    (tmp_path / "other" / "streams.safetensors").replace(folder / "streams.safetensors")
    with pytest.raises(StreamsError, match="two different saves"):
        load_streams(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "version 2"),
        (lambda c: c.update(surprise=1), "surprise"),
        (lambda c: c.pop("num_streams"), "num_streams is missing"),
        (lambda c: c.update(num_streams=33), "at most 32"),
        (lambda c: c.update(num_streams=2), "stream_embeddings is of shape"),
        (lambda c: c.update(num_msa_layers=3), "layers.1.* missing"),
        (lambda c: c.update(num_msa_layers=10**9), "more than any model"),
        (lambda c: c.update(lora_rank=5), "expected"),
        (lambda c: c.update(target_modules=["self_attn.q_proj"]), "has no place"),
        (lambda c: c.update(target_modules=["a", "b"]), "adapters of a are missing"),
        (lambda c: c.update(base_model=3), "base_model must be a string"),
        (lambda c: c.update(metadata=[1]), "metadata"),
    ],
)
def test_bad_configs_are_one_sentence(saved, change, message):
    folder = saved[0]
    config = json.loads((folder / "streams_config.json").read_text())
    change(config)
    (folder / "streams_config.json").write_text(json.dumps(config))
    with pytest.raises(StreamsError, match=message) as caught:
        load_streams(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, '"' + "x" * (2 << 20) + '"', "\x00"]
)
def test_bad_json_is_one_sentence(saved, text):
    (saved[0] / "streams_config.json").write_text(text)
    with pytest.raises(StreamsError):
        load_streams(saved[0])


def test_missing_files_and_values_that_are_not_finite(saved, tmp_path):
    folder, _model, config, tensors = saved
    with pytest.raises(StreamsError, match="holds no streams_config"):
        load_streams(tmp_path)
    for bad in (mx.nan, mx.inf):
        broken = tensors | {"pruner.lora_a": tensors["pruner.lora_a"] * bad}
        with pytest.raises(StreamsError, match=r"pruner.lora_a.*NaN"):
            save_streams(tmp_path / "n", config, broken, base_model=None, fingerprint=None)
    whole = tensors | {"pruner.lora_a": tensors["pruner.lora_a"].astype(mx.int32)}
    with pytest.raises(StreamsError, match=r"pruner.lora_a.*I32"):
        save_streams(tmp_path / "n", config, whole, base_model=None, fingerprint=None)
    (folder / "streams.safetensors").unlink()
    with pytest.raises(StreamsError, match="cannot be read"):
        load_streams(folder)


def test_damaged_weights_never_crash(saved):
    path = saved[0] / "streams.safetensors"
    good = path.read_bytes()
    header = 8 + struct.unpack("<Q", good[:8])[0]
    generator, sentences = random.Random(0), set()
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(generator.choice([1, 1, 2, 8])):
            bad[generator.randrange(header)] = generator.randrange(256)
        if generator.random() < 0.3:
            del bad[generator.randrange(len(bad)) :]
        path.write_bytes(bad)
        try:
            load_streams(saved[0])
        except SpecStreamError as error:
            sentences.add(str(error))
    assert len(sentences) > 20
    assert not any("\n" in sentence for sentence in sentences)


def test_the_base_is_known_again_quantised_and_cast_but_not_another():
    found = fingerprint(tiny_base())
    assert fingerprint(tiny_base()) == found
    for change in (
        lambda m: m.set_dtype(mx.bfloat16),
        lambda m: m.set_dtype(mx.float16),
        lambda m: nn.quantize(m, 64, 8),
        lambda m: nn.quantize(m, 64, 4),
        lambda m: nn.quantize(m, 64, 2),
    ):
        model = tiny_base()
        dims = base_dims(model)
        change(model)
        assert same_base(found, fingerprint(model)) is None
        assert base_dims(model) == dims
    assert "different ones" in same_base(found, fingerprint(tiny_base(seed=1)))
    assert "layers" in same_base(found, fingerprint(tiny_base(layers=5)))
    assert same_base("nonsense", found)


def test_a_wrong_base_is_refused(saved):
    streams = load_streams(saved[0])
    with pytest.raises(StreamsError, match="load them with a/b"):
        streams.check_base(tiny_base(seed=1))
    with pytest.raises(StreamsError, match="5 layers"):
        streams.check_base(tiny_base(layers=5))
