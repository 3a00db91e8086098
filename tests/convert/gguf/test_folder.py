"""A GGUF file becomes a folder that mlx-lm loads and that computes what the model computed before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlx_specstream.convert.gguf import architecture, open_gguf, write_model_folder
from mlx_specstream.errors import CheckpointError
from tests.convert.gguf import made
from tests.support import tiny

FAMILIES = ["llama", "qwen2", "qwen3"]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": False, "rope_theta": 500000.0}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
]
WIDE_QWEN3 = ("qwen3", {"head_dim": 128})
"""transformers reads no head width from qwen3 files and takes its default."""


def extra_metadata(family: str, overrides: dict[str, Any]) -> dict[str, made.Typed]:
    if "head_dim" not in overrides:
        return {}
    width = made.u32(overrides["head_dim"])
    return {f"{family}.attention.key_length": width, f"{family}.attention.value_length": width}


def write_case(path: Path, family: str, overrides: dict[str, Any]) -> Path:
    metadata = made.tiny_metadata(family, **overrides) | extra_metadata(family, overrides)
    path.write_bytes(made.gguf_bytes(metadata, made.tiny_tensors(family, **overrides)))
    return path


def converted(path: Path, folder: Path) -> Path:
    folder.mkdir()
    write_model_folder(open_gguf(path), folder)
    return folder


@pytest.mark.parametrize(("family", "overrides"), CASES)
def test_logits_in_mlx_lm(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    folder = converted(write_case(tmp_path / "x.gguf", family, overrides), tmp_path / "model")
    model, tokenizer = mlx_lm.load(str(folder))
    ids = mx.array([[5, 3, 250, 7, 7, 90]])
    expected = tiny.tiny_model(family, **overrides)(ids)
    assert mx.array_equal(model(ids), expected)
    assert tokenizer.eos_token_ids == {255}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "overrides"), [CASES[0], CASES[1], CASES[3], WIDE_QWEN3])
def test_logits_of_transformers_reading_the_same_file(
    tmp_path: Path, family: str, overrides: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    path = write_case(tmp_path / "x.gguf", family, overrides)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    model, _ = mlx_lm.load(str(converted(path, tmp_path / "model")))
    ids = [[5, 3, 250, 7, 7, 90]]
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(np.array(model(mx.array(ids))), expected, atol=1e-4)


def test_gemma3_in_mlx_lm(tmp_path: Path) -> None:
    folder = converted(made.write_tiny_gemma(tmp_path / "x.gguf"), tmp_path / "model")
    model, tokenizer = mlx_lm.load(str(folder))
    ids = mx.array([[5, 3, 250, 7, 7, 90]])
    assert mx.allclose(model(ids), tiny_gemma()(ids), atol=1e-4)
    assert not mx.allclose(model(ids), tiny_gemma(sliding_window=5)(ids), atol=1e-4)
    assert tokenizer.eos_token_ids == {1}
    assert tokenizer.encode("ab") == [2, made.PIECES.index(("ab", 1, -1.0))]


def tiny_gemma(**overrides: Any) -> Any:
    model = tiny.tiny_model("gemma3_text", **(made.GEMMA | overrides))
    model.sanitize({})  # where mlx-lm ties the head to the embedding
    return model


@pytest.mark.filterwarnings("ignore")
def test_gemma3_in_transformers(tmp_path: Path) -> None:
    """On the folder, which both read; transformers reads no windows from such files itself."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = converted(made.write_tiny_gemma(tmp_path / "x.gguf"), tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, _ = mlx_lm.load(str(folder))
    ids = [[5, 3, 250, 7, 7, 90, 12, 13]]
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(np.array(model(mx.array(ids))), expected, atol=1e-4)


def test_gemma3_of_27b_scales_queries_by_its_width(tmp_path: Path) -> None:
    words = made.gemma_metadata() | {"gemma3.block_count": made.u32(62)}
    path = tmp_path / "x.gguf"
    path.write_bytes(made.gguf_bytes(words, MANY))
    assert architecture.model_config(open_gguf(path))["query_pre_attn_scalar"] == 64 // 4


def test_progress_counts_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    gguf = open_gguf(made.write_tiny_gguf(tmp_path / "x.gguf"))
    write_model_folder(gguf, tmp_path, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == 4 * sum(t.num_bytes // 4 for t in gguf.tensors.values())


def test_config(tmp_path: Path) -> None:
    folder = converted(made.write_tiny_gguf(tmp_path / "x.gguf"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    wanted = tiny.tiny_config("llama", bos_token_id=254)
    assert {key: config[key] for key in wanted} == wanted
    assert config["rope_scaling"] is None
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 255


def test_several_ends_of_a_turn(tmp_path: Path) -> None:
    metadata = made.tiny_metadata("llama") | {"tokenizer.ggml.eot_token_id": made.u32(254)}
    path = tmp_path / "x.gguf"
    path.write_bytes(made.gguf_bytes(metadata, made.tiny_tensors("llama")))
    _, tokenizer = mlx_lm.load(str(converted(path, tmp_path / "model")))
    assert tokenizer.eos_token_ids == {254, 255}


@pytest.mark.parametrize("num_heads", [1, 2, 3])
def test_unpermute_undoes_interleave(num_heads: int) -> None:
    rows = np.random.default_rng(0).normal(size=(num_heads * 6, 4)).astype(np.float32)
    back = architecture.unpermute(made.interleave(rows, num_heads), num_heads)
    np.testing.assert_array_equal(back, rows)


def test_llama3_rope_is_recognised(tmp_path: Path) -> None:
    """Llama 3.1's table, computed here with its own words: wavelengths against the old context."""
    base, factors = 500000.0, []
    for pair in range(8):
        wave = 2 * np.pi * base ** (pair / 8)
        if wave < 8192 / 4:
            factors.append(1.0)
        elif wave > 8192 / 1:
            factors.append(8.0)
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    assert len(set(factors)) > 2
    metadata = made.tiny_metadata("llama", rope_theta=base)
    tensors = made.tiny_tensors("llama")
    for table, fits in ((factors, True), ([1.0, 2.0] * 4, False)):
        tensors["rope_freqs.weight"] = made.stored(np.array(table, np.float32))
        path = tmp_path / "x.gguf"
        path.write_bytes(made.gguf_bytes(metadata, tensors))
        if fits:
            scaling = architecture.model_config(open_gguf(path))["rope_scaling"]
            assert scaling["rope_type"] == "llama3"
            assert scaling["factor"] == 8.0
        else:
            with pytest.raises(CheckpointError, match="rope frequencies"):
                architecture.model_config(open_gguf(path))


def test_linear_rope_scaling(tmp_path: Path) -> None:
    scaling = {
        "llama.rope.scaling.type": made.text("linear"),
        "llama.rope.scaling.factor": made.f32(4),
    }
    path = tmp_path / "x.gguf"
    path.write_bytes(
        made.gguf_bytes(made.tiny_metadata("llama") | scaling, made.tiny_tensors("llama"))
    )
    model, _ = mlx_lm.load(str(converted(path, tmp_path / "model")))
    ids = mx.array([[5, 3, 250, 7]])
    settings = {"type": "linear", "factor": 4.0}
    assert mx.allclose(model(ids), tiny.tiny_model("llama", rope_scaling=settings)(ids), atol=1e-5)


REFUSED = [
    ({"general.architecture": made.text("mamba")}, "family 'mamba'"),
    ({"llama.expert_count": made.u32(8)}, "mixture of experts"),
    ({"llama.logit_scale": made.f32(2)}, "llama.logit_scale"),
    ({"llama.rope.scaling.type": made.text("yarn")}, "'yarn'"),
    ({"llama.rope.dimension_count": made.u32(8)}, "rope.dimension_count is 8"),
    ({"llama.attention.head_count_kv": made.u32(3)}, "do not fit together"),
    ({"llama.attention.head_count": made.u32(0)}, "do not fit together"),
    ({"llama.attention.head_count": made.i32s([4, 4])}, "should be a whole number"),
    ({"llama.block_count": made.u32(1 << 31)}, "do not fit together"),
    ({"llama.block_count": made.u32(5)}, "no tensor 'blk.4"),
    ({"llama.block_count": made.u32(3)}, "'blk.3"),
    ({"llama.feed_forward_length": made.u32(97)}, "expected"),
    ({"llama.attention.layer_norm_rms_epsilon": made.f32(float("nan"))}, "no use"),
]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gemma3.attention.sliding_window_pattern": made.u32(1)}, "pattern is 1"),
        ({"gemma3.attention.key_length_swa": made.u32(64)}, "key_length_swa differs"),
        ({"gemma3.final_logit_softcapping": made.f32(30)}, "final_logit_softcapping"),
    ],
)
def test_what_is_refused_of_gemma3(
    tmp_path: Path, changes: dict[str, made.Typed], said: str
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(made.gguf_bytes(made.gemma_metadata() | changes, MANY))
    with pytest.raises(CheckpointError, match=said):
        architecture.model_config(open_gguf(path))


MANY = {f"{number}.weight": made.stored(np.ones(1)) for number in range(70)}
MANY["token_embd.weight"] = made.stored(np.ones((512, 64)))
"""Enough tensors for any number of layers."""


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_is_refused(tmp_path: Path, changes: dict[str, made.Typed], said: str) -> None:
    path = tmp_path / "x.gguf"
    metadata = made.tiny_metadata("llama") | changes
    path.write_bytes(made.gguf_bytes(metadata, made.tiny_tensors("llama")))
    with pytest.raises(CheckpointError, match=said) as caught:
        write_model_folder(open_gguf(path), tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    tensors = made.tiny_tensors("llama")
    shape = tensors["blk.1.ffn_up.weight"].shape
    tensors["blk.1.ffn_up.weight"] = made.stored(np.full(shape, np.nan, np.float32))
    path = tmp_path / "x.gguf"
    path.write_bytes(made.gguf_bytes(made.tiny_metadata("llama"), tensors))
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight.*NaN"):
        write_model_folder(open_gguf(path), tmp_path)


def test_a_tensor_without_a_place(tmp_path: Path) -> None:
    tensors = made.tiny_tensors("llama") | {"blk.0.extra.weight": made.stored(np.ones(4))}
    path = tmp_path / "x.gguf"
    path.write_bytes(made.gguf_bytes(made.tiny_metadata("llama"), tensors))
    with pytest.raises(CheckpointError, match=r"'blk\.0\.extra\.weight' has no place"):
        write_model_folder(open_gguf(path), tmp_path)
