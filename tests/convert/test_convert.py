"""Conversions from end to end: every layout by its real writer, every family against PyTorch."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mlx_lm.utils import load_model  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from mlx_specstream.convert import cli  # noqa: E402
from mlx_specstream.convert.check import Proof  # noqa: E402
from mlx_specstream.convert.plan import Options, make_plan  # noqa: E402
from mlx_specstream.convert.writer import write_plan  # noqa: E402
from mlx_specstream.errors import CheckpointError, OptionError, OutputError, StreamsError  # noqa: E402
from mlx_specstream.weights.checkpoint import load_streams  # noqa: E402
from tests.convert import checkpoints as made  # noqa: E402

IDS = [[3, 14, 15, 2, 5, 35, 8, 9]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return made.save_base(tmp_path_factory.mktemp("base") / "hf")


@pytest.fixture(scope="module")
def streams(tmp_path_factory, base):
    return made.save_streams(tmp_path_factory.mktemp("streams") / "s1", base)


def convert(source, target, **options):
    plan = make_plan(Options(str(source), **options))
    write_plan(plan, target)
    return plan


def logits(folder):
    model, _ = load_model(folder)
    return np.array(model(mx.array(IDS)).astype(mx.float32))


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.float().numpy()


def same_logits(folder, model, tolerance=1e-4):
    assert np.abs(logits(folder) - torch_logits(model)).max() < tolerance


FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


# ---- families against PyTorch ------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("mode", ["lossless", "shared"])
def test_a_family_computes_the_same_in_mlx_token_for_token(tmp_path, family, mode):
    base = made.save_base(tmp_path / "base", family)
    fused = {"target_modules": FUSED} if family == "phi3" else {}
    prove_float32(tmp_path, made.save_streams(tmp_path / "streams", base, mode=mode, **fused))


@pytest.mark.parametrize("mode", ["lossless", "shared"])
def test_rotated_values_compute_the_same(tmp_path, base, mode):
    changes = {"value_rotation": 0.3, "rope_offset": "position"}
    prove_float32(tmp_path, made.save_streams(tmp_path / "streams", base, mode=mode, **changes))


def test_streams_that_know_the_next_token_compute_the_same(tmp_path, base):
    changes = {"next_token_rank": 3, "conditioner_tokens": 2}
    prove_float32(tmp_path, made.save_streams(tmp_path / "streams", base, **changes))
    found = load_streams(tmp_path / "out").config
    assert (found.next_token_rank, found.conditioner_tokens) == (3, 2)


def prove_float32(tmp_path, source):
    """Convert a checkpoint and demand every token and every draft to be PyTorch's."""
    plan = make_plan(Options(str(source)))
    proof = Proof(plan)
    write_plan(plan, tmp_path / "out", prove=proof.figures)
    found = proof.findings
    assert proof.passed, proof.report()
    assert max(found.errors.values()) < 1e-3
    assert found.tokens == 4 * 64
    assert not found.wrong_tokens
    assert found.drafts > 100
    assert not found.wrong_drafts
    assert max(found.weights.values()) == 0
    assert "greedy tokens as in PyTorch" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("tied", [True, False])
def test_phi3_base_computes_the_same(tmp_path, tied):
    model = made.hf_model("phi3", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "out")
    same_logits(tmp_path / "out", model)


@pytest.mark.parametrize(
    "quantise",
    [
        ["--q-bits", "4", "--q-group-size", "32"],
        ["--q-bits", "8", "--q-group-size", "32"],
        ["--q-bits", "2", "--q-group-size", "32"],
        ["--q-mode", "mxfp4"],
        ["--q-mode", "nvfp4"],
        ["--q-mode", "mxfp8"],
        ["--quant-predicate", "mixed_3_6", "--q-group-size", "32"],
    ],
)
def test_quantised_conversions_report_their_error(tmp_path, streams, capsys, quantise):
    out = tmp_path / "out"
    arguments = ["--hf-path", str(streams), "--mlx-path", str(out), "-q", *quantise, "--check"]
    assert cli.main(arguments) == 0
    assert "within its quantisation step" in capsys.readouterr().out
    model, config = load_model(out)
    assert config["quantization"]
    assert any(isinstance(m, nn.QuantizedLinear) for _, m in model.named_modules())
    found = load_streams(out)
    found.check_base(model)
    assert {tensor.dtype for tensor in found.tensors.values()} == {mx.float32}


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_dtype_is_honoured_and_proved(tmp_path, streams, dtype, kind):
    plan = make_plan(Options(str(streams), dtype=dtype, stream_dtype=dtype))
    proof = Proof(plan)
    write_plan(plan, tmp_path / "out", prove=proof.figures)
    assert proof.kind == kind
    assert proof.passed, proof.report()
    model, config = load_model(tmp_path / "out")
    assert model.model.embed_tokens.weight.dtype == getattr(mx, dtype)
    assert config["torch_dtype"] == dtype
    kinds = {tensor.dtype for tensor in load_streams(tmp_path / "out").tensors.values()}
    assert kinds == {getattr(mx, dtype)}


# ---- layouts -----------------------------------------------------------------------------------


def layout_sharded(folder):
    model = made.hf_model()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def torch_layout(**options):
    def write(folder):
        made.save_base(folder)
        (folder / "model.safetensors").unlink()
        torch.save(made.hf_model().state_dict(), folder / "pytorch_model.bin", **options)

    return write


def layout_sharded_bin(folder):
    made.save_base(folder)
    (folder / "model.safetensors").unlink()
    state = made.hf_model().state_dict()
    names = list(state)
    halves = {
        "pytorch_model-00001-of-00002.bin": names[:9],
        "pytorch_model-00002-of-00002.bin": names[9:],
    }
    for file, part in halves.items():
        torch.save({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def prefixed(change, suffix=".pt"):
    def write(folder):
        made.save_base(folder)
        (folder / "model.safetensors").unlink()
        state = {change(name): tensor for name, tensor in made.hf_model().state_dict().items()}
        torch.save({"model_state_dict": state, "step": 7}, folder / f"last{suffix}")

    return write


def layout_fused(folder):
    made.save_base(folder)
    state = made.hf_model().state_dict()
    for i in range(3):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        parts = [state.pop(f"{attention}.{name}_proj.weight") for name in "qkv"]
        state[f"{attention}.qkv_proj.weight"] = torch.cat(parts)
        parts = [state.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up")]
        state[f"{mlp}.gate_up_proj.weight"] = torch.cat(parts)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors"
    )


LAYOUTS = {
    "safetensors": made.save_base,
    "sharded safetensors": layout_sharded,
    "bin": torch_layout(),
    "legacy bin": torch_layout(_use_new_zipfile_serialization=False),
    "sharded bin": layout_sharded_bin,
    "DDP": prefixed(lambda name: f"module.{name}"),
    "compiled DDP": prefixed(lambda name: f"module._orig_mod.{name}", ".pth"),
    "FSDP": prefixed(lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module.")),
    "inner model": prefixed(lambda name: name.removeprefix("model.")),
    "model.model": prefixed(lambda name: f"model.{name}"),
    "fused": layout_fused,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_converts_to_the_same_model(tmp_path, layout):
    LAYOUTS[layout](tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out")
    same_logits(tmp_path / "out", made.hf_model())


def test_separate_projections_are_joined_where_the_model_has_them_fused(tmp_path):
    model = made.hf_model("phi3")
    model.save_pretrained(tmp_path / "in")
    state = model.state_dict()
    for i in range(3):
        fused = state.pop(f"model.layers.{i}.self_attn.qkv_proj.weight")
        for name, part in zip("qkv", fused.split((64, 32, 32)), strict=True):
            state[f"model.layers.{i}.self_attn.{name}_proj.weight"] = part.contiguous()
    save_file(state, tmp_path / "in" / "model.safetensors")
    convert(tmp_path / "in", tmp_path / "out")
    same_logits(tmp_path / "out", model)


def test_a_single_file_with_its_config_beside_it(tmp_path, base):
    shutil.copy(base / "config.json", tmp_path)
    torch.save(made.hf_model().state_dict(), tmp_path / "weights.pt")
    convert(tmp_path / "weights.pt", tmp_path / "out")
    same_logits(tmp_path / "out", made.hf_model())


@pytest.mark.parametrize("stated", [True, False])
def test_tied_and_untied_heads_whether_the_config_says_so_or_not(tmp_path, stated):
    for tied in (True, False):
        model = made.hf_model(tie_word_embeddings=tied)
        folder = tmp_path / str(tied)
        model.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "model.bin")
        (folder / "model.safetensors").unlink()
        made.edit_json(folder / "config.json", tie_word_embeddings=tied if stated else None)
        convert(folder, tmp_path / f"{tied}-out")
        same_logits(tmp_path / f"{tied}-out", model)


def test_rope_parameters_of_transformers_5_reach_mlx_lm(tmp_path):
    scaled = {
        "rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }  # fmt: skip
    for name, rope in (
        ("plain", {"rope_type": "default", "rope_theta": 50000.0}),
        ("scaled", scaled),
    ):
        model = made.hf_model(rope_parameters=rope)
        model.save_pretrained(tmp_path / name)
        made.edit_json(tmp_path / name / "config.json", rope_theta=None, rope_scaling=None)
        convert(tmp_path / name, tmp_path / f"{name}-out")
        config = json.loads((tmp_path / f"{name}-out" / "config.json").read_text())
        assert config["rope_theta"] == 50000.0
        same_logits(tmp_path / f"{name}-out", model)


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt", "in the base"])
def test_stream_tensors_come_in_any_file(tmp_path, base, streams, suffix):
    source = tmp_path / "in"
    shutil.copytree(streams, source)
    adapters = made.random_adapters(base, made.stream_config())
    state = made.stream_state(adapters)
    if suffix == "in the base":
        (source / "stream_model.safetensors").unlink()
        shutil.copy(base / "config.json", source)
        torch.save({**made.hf_model().state_dict(), **state}, source / "pytorch_model.bin")
    elif suffix != "safetensors":
        (source / "stream_model.safetensors").unlink()
        torch.save(state, source / f"stream_model.{suffix}")
    convert(source, tmp_path / "out")
    same_logits(tmp_path / "out", made.hf_model())
    check_streams(load_streams(tmp_path / "out"), state)


def check_streams(found, state):
    name = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
    ours = np.array(found.tensors["layers.2.self_attn.q_proj.lora_a"])
    assert np.array_equal(ours, state[name].numpy().T)
    assert np.array_equal(
        np.array(found.tensors["stream_embeddings"]), state["stream_embeddings.weight"].numpy()
    )
    assert np.array_equal(
        np.array(found.tensors["conditioner.mlp_in"]), state["conditioner.mlp_in.weight"].numpy()
    )
    assert len(found.tensors) == len(state)


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_a_conditioner_in_a_file_of_its_own_with_bare_names(tmp_path, base, streams, num_tokens):
    source, config = tmp_path / "in", made.stream_config(conditioner_tokens=num_tokens)
    shutil.copytree(streams, source)
    state = made.stream_state(made.random_adapters(base, config))
    bare = {
        name.removeprefix("conditioner.").removesuffix(".weight"): state[name].contiguous()
        for name in state
        if name.startswith("conditioner.")
    }
    rest = {name: value.contiguous() for name, value in state.items() if "conditioner" not in name}
    save_file(rest, source / "stream_model.safetensors")
    save_file(bare, source / "conditioner.safetensors")
    absent = dict.fromkeys(("conditioner_rank", "conditioner_hidden", "conditioner_tokens"))
    made.edit_json(source / "speculative_streaming.json", **absent)
    plan = convert(source, tmp_path / "out")
    assert plan.streams.config == config
    check_streams(load_streams(tmp_path / "out"), state)


def peft_model(base, **settings):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings}
    torch.manual_seed(3)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("safe", [True, False])
def test_a_peft_adapter_is_merged(tmp_path, base, safe, rslora):
    model = peft_model(base, use_rslora=rslora)
    model.save_pretrained(tmp_path / "in", safe_serialization=safe)
    if not safe:
        assert (tmp_path / "in" / "adapter_model.bin").exists()
    convert(tmp_path / "in", tmp_path / "out")
    same_logits(tmp_path / "out", model)


def test_streams_whose_adapters_peft_wrote(tmp_path, base, streams):
    wanted = ["self_attn.q_proj", "mlp.down_proj"]
    model = peft_model(base, layers_to_transform=[1, 2])
    model.save_pretrained(tmp_path / "in")
    state = made.stream_state(made.random_adapters(base, made.stream_config(target_modules=wanted)))
    rest = {name: tensor.contiguous() for name, tensor in state.items() if "layers" not in name}
    save_file(rest, tmp_path / "in" / "stream_model.safetensors")
    fields = json.loads((streams / "speculative_streaming.json").read_text())
    fields["target_modules"] = wanted
    (tmp_path / "in" / "speculative_streaming.json").write_text(json.dumps(fields))
    convert(tmp_path / "in", tmp_path / "out")
    found = load_streams(tmp_path / "out").tensors["layers.2.mlp.down_proj.lora_b"]
    theirs = model.base_model.model.model.layers[2].mlp.down_proj.lora_B["default"].weight
    assert np.array_equal(np.array(found), theirs.detach().numpy().T)
    made.edit_json(tmp_path / "in" / "speculative_streaming.json", lora_alpha=9.0)
    with pytest.raises(CheckpointError, match="must agree"):
        make_plan(Options(str(tmp_path / "in")))


@pytest.mark.parametrize("merge", ["lower", "all"])
def test_shared_adapters_are_merged_on_request(tmp_path, base, merge):
    source = made.save_streams(tmp_path / "in", base, mode="shared")
    plan = make_plan(Options(str(source), merge_lora=merge))
    proof = Proof(plan)
    write_plan(plan, tmp_path / "out", prove=proof.figures)
    assert proof.passed, proof.report()
    names = load_streams(tmp_path / "out").tensors
    assert ("layers.2.mlp.down_proj.lora_a" in names) == (merge == "lower")
    assert "layers.0.mlp.down_proj.lora_a" not in names


@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_gguf_base_with_and_without_streams(tmp_path, named):
    from mlx_specstream.convert.gguf import open_gguf, write_model_folder
    from tests.convert.gguf.made import write_tiny_gguf

    (tmp_path / "in").mkdir()
    file = write_tiny_gguf(tmp_path / "in" / "tiny.gguf")
    (tmp_path / "reference").mkdir()
    write_model_folder(open_gguf(file), tmp_path / "reference")
    convert(file if named == "file" else file.parent, tmp_path / "out")
    assert np.array_equal(logits(tmp_path / "out"), logits(tmp_path / "reference"))
    names = {path.name for path in (tmp_path / "reference").iterdir()}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}
    source = made.save_streams(
        tmp_path / "streams", tmp_path / "reference", num_msa_layers=1, pruner_rank=0
    )
    plan = make_plan(Options(str(source), base=str(file)))
    proof = Proof(plan)
    write_plan(plan, tmp_path / "both", prove=proof.figures)
    assert proof.passed, proof.report()


# ---- there and back ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["lossless", "shared"])
def test_there_and_back_is_bit_exact(tmp_path, base, dtype, mode):
    from safetensors.torch import load_file

    source = made.save_streams(tmp_path / "in", base, dtype, mode=mode)
    out, back = tmp_path / "out", tmp_path / "back"
    assert cli.main(["--hf-path", str(source), "--mlx-path", str(out), "--adapter-only"]) == 0
    assert cli.main(["--hf-path", str(out), "--mlx-path", str(back), "--to-pytorch"]) == 0
    first, second = (load_file(folder / "stream_model.safetensors") for folder in (source, back))
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name])
    fields = [json.loads((f / "speculative_streaming.json").read_text()) for f in (source, back)]
    for each in fields:
        each.pop("base_model_name_or_path")
    assert fields[0] == fields[1]
    convert(back, tmp_path / "again", base=str(base), adapter_only=True)
    bits = [(folder / "streams.safetensors").read_bytes() for folder in (out, tmp_path / "again")]
    assert bits[0] == bits[1]


# ---- what is written ---------------------------------------------------------------------------


def test_the_result_is_a_plain_mlx_lm_model_and_an_adapter_folder_needs_no_base(
    tmp_path, streams, base
):
    convert(streams, tmp_path / "out")
    same_logits(tmp_path / "out", made.hf_model())
    assert not list((tmp_path / "out").glob("model*streams*"))
    convert(streams, tmp_path / "alone", adapter_only=True)
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == [
        "README.md", "streams.safetensors", "streams_config.json",
    ]  # fmt: skip
    both = [load_streams(tmp_path / name) for name in ("out", "alone")]
    assert both[0].base == both[1].base
    assert "/" not in both[0].base.name
    shutil.copytree(streams, tmp_path / "moved")
    made.edit_json(tmp_path / "moved" / "speculative_streaming.json", base_model_name_or_path="x/y")
    with pytest.raises(CheckpointError, match="--adapter-only"):
        make_plan(Options(str(tmp_path / "moved")))
    plan = convert(tmp_path / "moved", tmp_path / "unknown", adapter_only=True)
    assert "no fingerprint" in plan.notes[0]
    assert load_streams(tmp_path / "unknown").base.name == "x/y"


def test_shards_have_an_index_and_load(tmp_path, base):
    plan = make_plan(Options(str(base)))
    write_plan(plan, tmp_path / "out", max_shard_bytes=50_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "out").glob("model-*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert len(files) > 3
    assert index["metadata"]["total_size"] == plan.num_bytes()
    same_logits(tmp_path / "out", made.hf_model())


def test_a_dry_run_names_every_tensor_and_writes_nothing(tmp_path, streams, capsys):
    out = tmp_path / "out"
    arguments = [
        "--hf-path",
        str(streams),
        "--mlx-path",
        str(out),
        "--dtype",
        "bfloat16",
        "--dry-run",
    ]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "model.layers.2.mlp.up_proj.weight" in text
    assert "F32 to BF16" in text
    assert "layers.2.mlp.down_proj.lora_b" in text
    assert "stream_model.safetensors: base_model.model.model.layers.2" in text
    assert not out.exists()


def test_an_existing_folder_is_left_alone(tmp_path, base):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputError, match="exists already"):
        convert(base, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_a_quantised_mlx_base_is_passed_through(tmp_path, base, streams):
    from mlx_specstream.convert.quantise import Quantisation

    convert(base, tmp_path / "small", quantisation=Quantisation(4, 32))
    made.edit_json(streams / "speculative_streaming.json")
    convert(streams, tmp_path / "out", base=str(tmp_path / "small"))
    assert np.array_equal(logits(tmp_path / "out"), logits(tmp_path / "small"))
    with pytest.raises(OptionError, match="quantised already"):
        make_plan(Options(str(tmp_path / "small"), quantisation=Quantisation(4, 32)))


# ---- what is refused ---------------------------------------------------------------------------


def break_with(change):
    def apply(folder):
        state = made.hf_model().state_dict()
        change(state)
        save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors")

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_with(lambda s: s.update({"model.layers.0.self_attn.q_prj.weight": torch.ones(2,
        2)})),
         r"q_prj.weight.*\(2, 2\) has no place; the nearest name is model.layers.0.self_attn.q_proj"),
        (break_with(lambda s: s.pop("model.norm.weight")), r"model.norm.weight \(64,\) is missing"),
        (break_with(lambda s: s.update({"model.norm.weight": torch.ones(65)})),
         r"model.norm.weight has the shape \(65,\), expected \(64,\)"),
        (break_with(lambda s: s.update({"module.model.norm.weight": torch.ones(64)})),
         "two tensors mean"),
        (lambda f: made.edit_json(f / "config.json", num_hidden_layers=4), "layers.3.*missing"),
        (lambda f: made.edit_json(f / "config.json", num_hidden_layers=10**9), "layers"),
        (lambda f: made.edit_json(f / "config.json", hidden_size=10**12), "hidden_size"),
        (lambda f: made.edit_json(f / "config.json", hidden_size="x"), "hidden_size"),
        (lambda f: made.edit_json(f / "config.json", model_type="../evil"), "model_type"),
        (lambda f: made.edit_json(f / "config.json", model_type="nothing"), "no model of the type"),
        (lambda f: made.edit_json(f / "config.json", model_type=None), "model_type"),
        (lambda f: made.edit_json(f / "config.json", quantization_config={"quant_method": "awq"}),
         "another program"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "not a safetensors file"),
    ],
)  # fmt: skip
def test_a_bad_base_is_one_sentence(tmp_path, change, message):
    folder = made.save_base(tmp_path / "in")
    change(folder)
    with pytest.raises((CheckpointError, OptionError), match=message) as caught:
        convert(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": 2}, "schema 2"),
        ({"schema": None}, "schema"),
        ({"surprise": 1}, "surprise"),
        ({"num_streams": 4}, r"stream_embeddings.*\(3, 64\), expected \(4, 64\)"),
        ({"num_msa_layers": 1}, r"layers.1.* has no place"),
        ({"num_msa_layers": 4}, "4 MSA layers"),
        ({"lora_rank": 5}, "expected"),
        ({"target_modules": ["self_attn.q_proj"]}, "has no place"),
        ({"target_modules": ["self_attn.zzz"]}, "does not have"),
        ({"stream_init": "odd"}, "stream_init"),
        ({"pruner_rank": 0}, "pruner.* has no place"),
        ({"conditioner_rank": 0, "conditioner_hidden": 0}, "conditioner.* has no place"),
        ({"mode": "odd"}, "mode"),
    ],
)
def test_streams_that_do_not_fit_are_one_sentence(tmp_path, streams, fields, message):
    source = tmp_path / "in"
    shutil.copytree(streams, source)
    made.edit_json(source / "speculative_streaming.json", **fields)
    with pytest.raises((CheckpointError, StreamsError), match=message) as caught:
        make_plan(Options(str(source)))
    assert "\n" not in str(caught.value)


def test_nan_in_streams_leaves_nothing_behind(tmp_path, base):
    adapters = made.random_adapters(base, made.stream_config())
    adapters.stream_embeddings.data[0, 0] = torch.nan
    from mlx_specstream.convert.pytorch.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / "in", adapters, str(base))
    with pytest.raises(StreamsError, match="'stream_embeddings' holds NaN"):
        convert(tmp_path / "in", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    "arguments", [["--q-bits", "4"], ["--q-mode", "mxfp4"], ["--max-shard-mb", "0"]]
)
def test_options_that_contradict_are_refused(base, arguments):
    with pytest.raises(OptionError):
        cli.main(["--hf-path", str(base), *arguments])


@pytest.mark.parametrize(
    ("bits", "group_size", "mode"), [(7, 32, "affine"), (4, 48, "affine"), (4, 128, "affine")]
)
def test_impossible_quantisations_are_refused(base, bits, group_size, mode):
    from mlx_specstream.convert.quantise import Quantisation

    with pytest.raises(OptionError):
        make_plan(Options(str(base), quantisation=Quantisation(bits, group_size, mode)))


def test_lossless_streams_are_not_merged(streams):
    with pytest.raises(OptionError, match="lossless"):
        make_plan(Options(str(streams), merge_lora="all"))


@pytest.mark.parametrize(
    "setting",
    [{"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"q_proj": 2}}, {"peft_type": "IA3"}],
)
def test_peft_variants_that_are_more_than_lora_are_named(tmp_path, base, setting):
    peft_model(base).save_pretrained(tmp_path / "in")
    made.edit_json(tmp_path / "in" / "adapter_config.json", **setting)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        make_plan(Options(str(tmp_path / "in")))


# ---- the proof and the upload ------------------------------------------------------------------


def test_the_proof_fails_where_a_weight_or_an_adapter_is_wrong(tmp_path, streams):
    plan = make_plan(Options(str(streams)))

    def spoilt(name, file):
        def prove(folder):
            weights = mx.load(str(folder / file))
            weights[name] = weights[name] * 1.01
            mx.eval(weights)
            mx.save_safetensors(str(folder / file), weights)
            config = folder / "streams_config.json"
            made.edit_json(config, tensors_digest=None)
            return proof.figures(folder)

        return prove

    proof = Proof(plan)
    name = "model.layers.1.mlp.up_proj.weight"
    write_plan(plan, tmp_path / "a", prove=spoilt(name, "model.safetensors"))
    assert not proof.passed
    assert f"FAILED: {name} differs from its source" in proof.report()
    proof = Proof(plan)
    name = "layers.2.self_attn.q_proj.lora_a"
    write_plan(plan, tmp_path / "b", prove=spoilt(name, "streams.safetensors"))
    assert not proof.passed
    assert proof.findings.errors["main logits"] < 1e-3
    assert proof.findings.errors["stream logits"] > 1e-2


def test_the_proof_does_not_trust_our_own_reader(tmp_path, streams, monkeypatch):
    """A reader that is wrong in the same way on both sides is found out."""
    from mlx_specstream.weights.tensorfile import TensorFile

    read = TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda file, name: read(file, name) * np.float32(1.1))
    plan = make_plan(Options(str(streams)))
    proof = Proof(plan)
    write_plan(plan, tmp_path / "out", prove=proof.figures)
    assert not proof.passed, proof.report()


def test_the_proof_runs_on_what_converts(tmp_path, base):
    """Gates, adapters merged below, a folder with model.pt, fused rows, a merged LoRA."""
    adapters = made.random_adapters(base, made.stream_config(mode="shared"))
    gates = {f"base_model.model.model.layers.{i}.stream_gate": torch.randn(4) for i in (1, 2)}
    state = {
        name: value
        for name, value in {**made.stream_state(adapters), **gates}.items()
        if "layers.0." not in name
    }
    source = made.save_streams(tmp_path / "in", base, mode="shared")
    save_file({n: t.contiguous() for n, t in state.items()}, source / "stream_model.safetensors")
    layout_fused(tmp_path / "fused")
    (tmp_path / "pt").mkdir()
    shutil.copy(base / "config.json", tmp_path / "pt")
    torch.save(
        {"model": made.hf_model().state_dict(), "rng": torch.ones(3)}, tmp_path / "pt/model.pt"
    )
    peft_model(base).save_pretrained(tmp_path / "peft")
    for number, folder in enumerate(
        (source, tmp_path / "fused", tmp_path / "pt", tmp_path / "peft")
    ):
        plan = make_plan(Options(str(folder)))
        proof = Proof(plan)
        write_plan(plan, tmp_path / f"out{number}", prove=proof.figures)
        assert proof.passed, proof.report()


def test_upload_goes_through_the_hub_client(tmp_path, streams, monkeypatch, capsys):
    calls = []

    class Api:
        def create_repo(self, repo_id, exist_ok, private):
            calls.append(("create", repo_id))

        def upload_folder(self, repo_id, folder_path, repo_type, allow_patterns):
            calls.append(("upload", repo_id, sorted(p.name for p in folder_path.iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    arguments = ["--hf-path", str(streams), "--mlx-path", str(tmp_path / "out"), "--adapter-only"]
    assert cli.main([*arguments, "--upload-repo", "me/streams"]) == 0
    assert calls[0] == ("create", "me/streams")
    assert "streams.safetensors" in calls[1][2]
    Api.upload_folder = lambda *a, **k: (_ for _ in ()).throw(OSError("no network"))
    arguments[3] = str(tmp_path / "second")
    with pytest.raises(CheckpointError, match="could not be uploaded"):
        cli.main([*arguments, "--upload-repo", "me/streams"])
    assert (tmp_path / "second" / "streams.safetensors").exists()
    Api.upload_folder = lambda *a, **k: (_ for _ in ()).throw(RuntimeError("offline\nand more"))
    arguments[3] = str(tmp_path / "third")
    with pytest.raises(CheckpointError, match="could not be uploaded") as caught:
        cli.main([*arguments, "--upload-repo", "me/streams"])
    assert "\n" not in str(caught.value)
    arguments[3] = str(tmp_path / "fourth")
    with pytest.raises(OptionError, match="is no repository"):
        cli.main([*arguments, "--upload-repo", "a/b/c"])
