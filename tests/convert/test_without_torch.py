"""PyTorch-format files end to end where PyTorch is not installed, against mlx-lm's own model."""

import contextlib
import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama
from mlx_lm.utils import load_model

from mlx_specstream.convert import cli
from mlx_specstream.convert.plan import Options, make_plan
from mlx_specstream.convert.writer import write_plan
from mlx_specstream.errors import CheckpointError
from mlx_specstream.weights.checkpoint import load_streams
from tests.convert import torch_files
from tests.convert.torch_files import Call

IDS = mx.array([[3, 14, 15, 2, 5, 35, 8, 9]])
SIZES = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 61,
    "tie_word_embeddings": False,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 70.0}


def weights(seed=0):
    """Random weights of the model in Hugging Face's names."""
    generator = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (61, 32), "model.norm.weight": (32,)}
    for i in range(2):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (32,)
        for name, rows in (("q", 32), ("k", 16), ("v", 16), ("o", 32)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, 32)
        for name, shape in (("gate", (48, 32)), ("up", (48, 32)), ("down", (32, 48))):
            shapes[f"{layer}.mlp.{name}_proj.weight"] = shape
    shapes["lm_head.weight"] = (61, 32)
    return {
        name: generator.normal(size=shape).astype(np.float32) * 0.3 + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def expected_logits(state):
    """What mlx-lm computes from these weights, its rotation's base set by hand."""
    arguments = llama.ModelArgs.from_dict({**SIZES, "rope_theta": ROPE["rope_theta"]})
    model = llama.Model(arguments)
    model.load_weights([(name, mx.array(value)) for name, value in state.items()])
    return np.array(model(IDS))


def logits(folder):
    return np.array(load_model(folder)[0](IDS))


def write_base(folder, value, file="pytorch_model.bin", **options):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SIZES, "rope_parameters": ROPE}))
    torch_files.save(value, folder / file, **options)
    return folder


def convert(source, target, **options):
    write_plan(make_plan(Options(str(source), **options)), target)
    return target


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_state_dict_computes_the_same(tmp_path, legacy):
    state = weights()
    out = convert(write_base(tmp_path / "in", state, legacy=legacy), tmp_path / "out")
    assert np.abs(logits(out) - expected_logits(state)).max() < 1e-5
    loaded = mx.load(str(out / "model.safetensors"))
    assert all(np.array_equal(np.array(loaded[name]), value) for name, value in state.items())
    assert json.loads((out / "config.json").read_text())["rope_theta"] == ROPE["rope_theta"]


def test_fused_projections_are_split_in_their_order(tmp_path):
    state, fused = weights(), weights()
    for i in range(2):
        for name, parts in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
            layer = f"model.layers.{i}.{name.partition('.')[0]}"
            rows = [fused.pop(f"{layer}.{part}_proj.weight") for part in parts]
            fused[f"model.layers.{i}.{name}_proj.weight"] = np.concatenate(rows)
    out = convert(write_base(tmp_path / "in", fused), tmp_path / "out")
    assert np.abs(logits(out) - expected_logits(state)).max() < 1e-5


@pytest.mark.parametrize(("alpha", "rslora", "scale"), [(6, False, 3.0), (6, True, 6 / 2**0.5)])
def test_lora_is_merged_with_its_scale(tmp_path, alpha, rslora, scale):
    state, generator = weights(), np.random.default_rng(1)
    base = write_base(tmp_path / "base", state)
    a, b = (generator.normal(size=s).astype(np.float32) * 0.2 for s in ((2, 32), (16, 2)))
    name = "model.layers.1.self_attn.v_proj"
    adapter = {f"base_model.model.{name}.lora_{x}.weight": each for x, each in zip("AB", (a, b))}  # noqa: B905
    (tmp_path / "in").mkdir()
    torch_files.save(adapter, tmp_path / "in" / "adapter_model.bin")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "use_rslora": rslora}
    fields["base_model_name_or_path"] = str(base)
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(fields))
    merged = {**state, f"{name}.weight": state[f"{name}.weight"] + np.float32(scale) * (b @ a)}
    out = convert(tmp_path / "in", tmp_path / "out")
    assert np.abs(logits(out) - expected_logits(merged)).max() < 1e-5


# ---- trainers' files ---------------------------------------------------------------------------

SCALAR = Call(
    "numpy._core.multiarray.scalar", (Call("numpy.dtype", ("f8", False, True)), b"12345678")
)
BESIDE = {
    "rng_state": np.arange(4, dtype=np.int64),
    "global_step": np.array(3, np.int64),
    "loss": SCALAR,
    "device": Call("torch.device", ("cuda", 0)),
    "seen": Call("builtins.set", ([1, 2],)),
    "counts": Call("collections.defaultdict", (Call("builtins.int"),)),
    "args": Call("copyreg._reconstructor", (Call("argparse.Namespace"), Call("builtins.object"), None), {"lr": 1}),
    "hyper_parameters": Call("__main__.Settings", ((),), {"path": Call("pathlib.PosixPath", ("a",))}),
    "optimizer": {"state": {0: {"exp_avg": np.ones(3, np.float32)}}},
    (1, 2): "a key that is a tuple",
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "wrap"),
    [
        ("last.ckpt", lambda s: {"state_dict": {f"model.{n}": t for n, t in s.items()}, **BESIDE}),
        ("last.pt", lambda s: {"model": s, "state_dict": s, **BESIDE}),
        ("last.pt", lambda s: {"model": {"module": s}, "ema": {"x": np.ones(2)}, **BESIDE}),
        ("last.pth", lambda s: {"model_state_dict": Call("collections.OrderedDict", ([[*p] for p in s.items()],)),
         **BESIDE}),
        ("model.pt", lambda s: {f"_fsdp_wrapped_module.{n}": t for n, t in s.items()}),
    ],
)  # fmt: skip
def test_trainers_files_are_opened_whatever_is_beside_the_weights(tmp_path, file, wrap):
    state = weights()
    out = convert(write_base(tmp_path / "in", wrap(state), file), tmp_path / "out")
    assert np.abs(logits(out) - expected_logits(state)).max() < 1e-5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"model": {"w": np.ones(2)}, "state_dict": {"w": np.zeros(2)}}, "different weights under"),
        (
            {"a": np.ones(2), "b": Call("numpy._core.multiarray._reconstruct", (1,))},
            "'b' is made by",
        ),
        ({"a": np.ones(2), "b": Call("builtins.eval", ("1",))}, "mentions 'builtins.eval'"),
        ({"a": np.ones(2), "b": Call("torch.load", ("x",))}, "mentions 'torch.load'"),
    ],
)
def test_what_is_refused_says_why(tmp_path, value, message):
    with pytest.raises(CheckpointError, match=message):
        make_plan(Options(str(write_base(tmp_path / "in", value))))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"params": {"w": np.ones(2)}}, "no tensors by name but inside 'params'"),
        ({0: np.ones(2)}, "name is 'int', which is not text"),
        ({"a": np.ones(2), "b": Call("torch._utils._rebuild_tensor_v3", (1,))}, "8-bit floats"),
        ({"a": np.ones(2), "b": Call("torch._utils._rebuild_qtensor", (1,))}, "dequantize"),
        ({"a": np.ones(2), "b": Call("torch.ComplexFloatStorage")}, "complex numbers"),
    ],
)
def test_what_to_save_instead_is_said(tmp_path, value, message):
    with pytest.raises(CheckpointError, match=message):
        make_plan(Options(str(write_base(tmp_path / "in", value))))


def test_a_tar_of_the_first_torch_is_named(tmp_path):
    import tarfile

    write_base(tmp_path / "in", weights())
    with tarfile.open(tmp_path / "in" / "pytorch_model.bin", "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    with pytest.raises(CheckpointError, match="a tar file"):
        make_plan(Options(str(tmp_path / "in")))


def test_8_bit_floats_are_not_called_damage(tmp_path):
    folder = write_base(tmp_path / "in", weights())
    (folder / "pytorch_model.bin").unlink()
    header = {"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(2))
    with pytest.raises(CheckpointError, match="holds 'a' in the number format F8_E4M3"):
        make_plan(Options(str(folder)))


@pytest.mark.parametrize(
    "beside", ["sampler.bin", "random_states_0.bin", "consolidated.safetensors", "rng_state_1.pth"]
)
def test_what_trainers_put_beside_weights_is_no_weights(tmp_path, beside):
    folder = write_base(tmp_path / "in", weights())
    (folder / beside).write_bytes(b"of another program")
    assert make_plan(Options(str(folder))).base


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("__0_0.distcp", "dcp_to_torch"),
        ("weights/__0_0.distcp", "dcp_to_torch"),
        ("global_step1/zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_to_fp32.py"),
        ("flax_model.msgpack", "Flax's"),
    ],
)
def test_weights_in_a_form_that_is_not_read_are_named(tmp_path, file, message):
    folder = write_base(tmp_path / "in", weights())
    (folder / "pytorch_model.bin").unlink()
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        make_plan(Options(str(folder)))


# ---- values ------------------------------------------------------------------------------------


def rebuilt(metadata, strides=(1,), size=2, count=2):
    storage = Call("", ("storage", Call("torch.FloatStorage"), "0", "cpu", count))
    arguments = (storage, 0, (size,), strides, False, {}, metadata)
    return Call("torch._utils._rebuild_tensor_v2", arguments)


def read(tmp_path, *tensors):
    """Read hand-made tensors of one storage that holds 1, 2, ..."""
    from mlx_specstream.convert.torchfile import read_torch_file

    path = tmp_path / "x.bin"
    value = {"0": np.arange(1, 3, dtype=np.float32), **dict(zip("abc", tensors, strict=False))}
    return read_torch_file(torch_files.save(value, path))


def test_a_negated_tensor_is_negated(tmp_path):
    found = read(tmp_path, rebuilt({"neg": True}), rebuilt({}), rebuilt(None))
    assert found["a"].make()[0].tolist() == [-1, -2]
    assert found["a"].start is None
    assert found["b"].make()[0].tolist() == found["c"].make()[0].tolist() == [1, 2]


@pytest.mark.parametrize("metadata", [{"conj": True}, {"neg": True, "conj": True}, {"x": 1}, [1]])
def test_metadata_that_would_change_values_is_refused(tmp_path, metadata):
    with pytest.raises(CheckpointError, match="metadata"):
        read(tmp_path, rebuilt(metadata))


def test_expanded_tensors_are_read_within_bounds(tmp_path):
    assert read(tmp_path, rebuilt(None, (0,), 5))["a"].make()[0].tolist() == [1] * 5
    with pytest.raises(CheckpointError, match="repeats 2 values"):
        read(tmp_path, rebuilt(None, (0,), 1 << 40))


def test_torch_is_not_needed(tmp_path):
    folder = write_base(tmp_path / "in", weights())
    code = "import sys; sys.modules['torch'] = None\nfrom mlx_specstream.cli import main\n"
    code += f"sys.exit(main(['convert', '--model', {str(folder)!r}, '--mlx-path', {str(tmp_path / 'o')!r}]))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (tmp_path / "o" / "model.safetensors").exists()


# ---- streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [False, True], ids=["save_pretrained", "state dict"])
def test_stream_embeddings_that_peft_trained_whole(tmp_path, raw):
    generator, base = np.random.default_rng(2), write_base(tmp_path / "base", weights())
    (tmp_path / "in").mkdir()
    prefix, middle = "base_model.model.", ".modules_to_save.default" if raw else ""
    tensors = {f"{prefix}stream_embeddings{middle}.weight": generator.normal(size=(3, 32))}
    if raw:
        tensors[f"{prefix}stream_embeddings.original_module.weight"] = np.zeros((3, 32))
    name = f"{prefix}model.layers.1.self_attn.q_proj"
    tensors[f"{name}.lora_A.weight"] = generator.normal(size=(2, 32))
    tensors[f"{name}.lora_B.weight"] = generator.normal(size=(32, 2))
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    torch_files.save(tensors, tmp_path / "in" / "adapter_model.bin")
    fields = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "modules_to_save": ["stream_embeddings"],
    }
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(fields))
    streams = {
        "schema": 1, "num_streams": 3, "num_msa_layers": 1, "lora_rank": 2, "lora_alpha": 4,
        "target_modules": ["self_attn.q_proj"], "base_model_name_or_path": str(base),
    }  # fmt: skip
    (tmp_path / "in" / "speculative_streaming.json").write_text(json.dumps(streams))
    found = load_streams(convert(tmp_path / "in", tmp_path / "out")).tensors
    name = f"{prefix}stream_embeddings{middle}.weight"
    assert np.array_equal(np.array(found["stream_embeddings"]), tensors[name])
    fields["modules_to_save"] = ["lm_head"]
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="merge the adapter"):
        make_plan(Options(str(tmp_path / "in")))


# ---- what does not fit ------------------------------------------------------------------------


def write_adapter(folder, base, tensors, **fields):
    folder.mkdir()
    torch_files.save(
        {f"base_model.model.{name}": value.astype(np.float32) for name, value in tensors.items()},
        folder / "adapter_model.bin",
    )
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **fields}
    fields["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def pair(module, inputs=32, outputs=32, rank=2):
    return {
        f"{module}.lora_A.weight": np.ones((rank, inputs)),
        f"{module}.lora_B.weight": np.ones((outputs, rank)),
    }


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        (pair(Q, inputs=16), {}, r"by \(32, 16\), and the base's is \(32, 32\)"),
        (pair(Q, outputs=64), {}, r"by \(64, 32\)"),
        (pair(Q, rank=3), {}, "not of rank 2, as its config says"),
        ({**pair(Q), f"{Q}.lora_B.weight": np.ones((32, 3))}, {}, "not of rank 2"),
        (pair("model.layers.7.self_attn.q_proj"), {}, "which the base lacks"),
        ({**pair(Q), **pair("lm_head", outputs=61)}, {}, "lm_head.lora_A.weight' is not the LoRA of a layer"),
        ({**pair(Q), "model.embed_tokens.lora_embedding_A": np.ones((2, 61))}, {}, "is not the LoRA of a layer"),
        ({**pair(Q), "model.embed_tokens.weight": np.ones((61, 32))}, {}, "is not the LoRA of a layer"),
        (pair(Q), {"lora_alpha": float("nan")}, "are no LoRA"),
        (pair(Q), {"r": 10**400}, "are no LoRA"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_one_sentence(tmp_path, tensors, fields, message):
    base = write_base(tmp_path / "base", weights())
    folder = write_adapter(tmp_path / "in", base, tensors, **fields)
    with pytest.raises(CheckpointError, match=message):
        make_plan(Options(str(folder)))


def test_lora_of_weights_that_mlx_lm_stacks_is_not_lost(tmp_path):
    """Each expert's LoRA would have to be added before mlx-lm makes one tensor of all experts."""
    sizes = {**SIZES, "model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
    state = {name: value for name, value in weights().items() if ".mlp." not in name}
    for i in range(2):
        layer = f"model.layers.{i}.block_sparse_moe"
        state[f"{layer}.gate.weight"] = np.ones((2, 32), np.float32)
        for expert in range(2):
            for name, shape in (("w1", (48, 32)), ("w2", (32, 48)), ("w3", (48, 32))):
                state[f"{layer}.experts.{expert}.{name}.weight"] = np.ones(shape, np.float32)
    base = write_base(tmp_path / "base", state)
    (base / "config.json").write_text(json.dumps({**sizes, "rope_parameters": ROPE}))
    expert = pair("model.layers.0.block_sparse_moe.experts.1.w1", outputs=48)
    assert make_plan(Options(str(write_adapter(tmp_path / "q", base, pair(Q))))).base
    with pytest.raises(CheckpointError, match=r"experts\.1\.w1\.weight', which mlx-lm keeps"):
        make_plan(Options(str(write_adapter(tmp_path / "in", base, expert))))


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_whole_numbers_do_not_pass_for_floats(tmp_path, dtype):
    state = weights()
    state["model.norm.weight"] = state["model.norm.weight"].astype(dtype)
    folder = write_base(tmp_path / "in", state)
    if dtype is np.float32:
        assert make_plan(Options(str(folder))).base
        return
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight' is I64, expected floats"):
        make_plan(Options(str(folder)))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("copy", [True, False])
def test_a_tied_head_is_left_out_and_another_one_is_not_lost(tmp_path, family, copy):
    state = weights()
    sizes = {**SIZES, "model_type": family, "tie_word_embeddings": True, "head_dim": 8}
    sizes["sliding_window_pattern"] = 2
    for i in range(2 if "gemma" in family else 0):
        layer = f"model.layers.{i}"
        state |= {
            f"{layer}.{n}_feedforward_layernorm.weight": np.ones(32, np.float32)
            for n in ("pre", "post")
        }
        if family == "gemma3_text":
            state |= {f"{layer}.self_attn.{n}_norm.weight": np.ones(8, np.float32) for n in "qk"}
    if copy:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    folder = write_base(tmp_path / "in", state)
    (folder / "config.json").write_text(json.dumps({**sizes, "rope_parameters": ROPE}))
    if copy:
        out = convert(folder, tmp_path / "out")
        assert "lm_head.weight" not in mx.load(str(out / "model.safetensors"))
        assert np.isfinite(logits(out)).all()
        return
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds other values"):
        make_plan(Options(str(folder)))


def test_a_full_disk_is_not_called_a_source_that_cannot_be_read(tmp_path, monkeypatch):
    from mlx_specstream.errors import OutputError
    from mlx_specstream.weights.tensorfile import TensorWriter

    def full(*_):
        raise OSError(27, "File too large")

    monkeypatch.setattr(TensorWriter, "copy", full)
    with pytest.raises(OutputError, match="larger than this file system allows"):
        convert(write_base(tmp_path / "in", weights()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- messages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["torch_dtype", "dtype", "rope_parameters", "num_hidden_layers",
    "tie_word_embeddings", "rope_scaling", "hidden_act", "rms_norm_eps", "quantization"])  # fmt: skip
@pytest.mark.parametrize("value", [7, [], {}, [1], {"a": 1}, "x", -1.5, True, {"rope_type": []}])
def test_fields_of_wrong_types_never_end_in_a_traceback(tmp_path, field, value):
    from mlx_specstream.errors import SpecStreamError

    folder = write_base(tmp_path / "in", weights())
    config = {**SIZES, "rope_parameters": ROPE, field: value}
    (folder / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(SpecStreamError):
        make_plan(Options(str(folder)))


def test_an_existing_target_is_told_before_anything_is_read(tmp_path):
    from mlx_specstream.errors import OutputError

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    for more in ([], ["--to-pytorch"]):
        with pytest.raises(OutputError, match="exists already"):
            cli.main(["--model", "no/such-model", "--mlx-path", str(tmp_path / "out"), *more])


def test_names_of_files_cannot_steer_the_terminal(tmp_path, capsys):
    folder = write_base(tmp_path / "in", weights(), "a\x1b[2Jb.pt")
    target = tmp_path / "o\x1b[31m"
    assert cli.main(["--model", str(folder), "--mlx-path", str(target), "--dry-run"]) == 0
    assert cli.main(["--model", str(folder), "--mlx-path", str(target)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert "\x1b" not in (target / "README.md").read_text()
