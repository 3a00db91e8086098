"""A converter that is broken on purpose: the proof fails, whatever is broken and however little it shows."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from mlx_specstream.convert import adapters, base, check_runs, names, plan, tensors  # noqa: E402
from mlx_specstream.convert.check import Proof  # noqa: E402
from mlx_specstream.convert.plan import Options, make_plan  # noqa: E402
from mlx_specstream.convert.quantise import Quantisation  # noqa: E402
from mlx_specstream.convert.tensors import Tensor  # noqa: E402
from mlx_specstream.convert.writer import write_plan  # noqa: E402
from tests.convert import checkpoints as made  # noqa: E402
from tests.convert.test_convert import layout_fused, peft_model  # noqa: E402

Patch = pytest.MonkeyPatch
KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16", "stream_dtype": "bfloat16"},
    "quantised": {"quantisation": Quantisation(4, 32)},
}


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: Patch) -> None:
    monkeypatch.setattr(check_runs, "NUM_TOKENS", 8)
    monkeypatch.setattr(check_runs, "PROMPTS", check_runs.PROMPTS[:1])


def prove(tmp_path: Path, source: Path, **options: Any) -> Proof:
    wanted = make_plan(Options(str(source), **options))
    proof = Proof(wanted)
    write_plan(wanted, tmp_path / "out", prove=proof.figures)
    shutil.rmtree(tmp_path / "out")
    return proof


# ---- sources: a family, and the files it comes in ----------------------------------------------


def in_safetensors(folder: Path) -> None:
    assert (folder / "model.safetensors").exists()


def in_files(folder: Path, **files: Callable[[str], bool]) -> None:
    """Put the weights into torch files instead, each those whose names it takes."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for stem, takes in files.items():
        torch.save({"model": {n: t for n, t in state.items() if takes(n)}}, folder / f"{stem}.pt")


def in_one_file(folder: Path) -> None:
    in_files(folder, model=lambda _: True)


def in_two_files(folder: Path) -> None:
    in_files(folder, pytorch_model=lambda n: ".0." in n, weights=lambda n: ".0." not in n)


def with_streams(
    tmp_path: Path, family: str, layout: Callable[[Path], object], **changes: Any
) -> Path:
    folder = made.save_base(tmp_path / "base", family)
    layout(folder)
    reference = made.save_base(tmp_path / "reference", family)
    source = made.save_streams(tmp_path / "streams", reference, **changes)
    made.edit_json(source / "speculative_streaming.json", base_model_name_or_path=str(folder))
    return source


def alone(tmp_path: Path, family: str, layout: Callable[[Path], object]) -> Path:
    folder = made.save_base(tmp_path / "base", family, **FIELDS.get(family, {}))
    layout(folder)
    return folder


# ---- ways to be wrong --------------------------------------------------------------------------

Table = dict[str, Tensor]


def after_sorting(change: Callable[[Table, Table], tuple[Table, Table]]) -> Callable[[Patch], None]:
    """Make `sort_names` return what `change` makes of the base's and the streams' tensors."""

    def patch(monkeypatch: Patch) -> None:
        real = names.sort_names
        monkeypatch.setattr(plan, "sort_names", lambda *given: change(*real(*given)))

    return patch


def changed(tensor: Tensor, change: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    read = tensor.read
    return dataclasses.replace(tensor, read=lambda: change(read()), start=None)


def base_values(part: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Patch], None]:
    return after_sorting(
        lambda own, streams: (
            {n: changed(t, change) if part in n else t for n, t in own.items()},
            streams,
        )
    )


def stream_values(part: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Patch], None]:
    return after_sorting(
        lambda own, streams: (
            own,
            {n: changed(t, change) if part in n else t for n, t in streams.items()},
        )
    )


def swapped(table: Table, one: str, other: str) -> Table:
    """Exchange what stands under names with `one` and with `other`."""

    def partner(name: str) -> str:
        return name.replace(one, "@").replace(other, one).replace("@", other)

    return {
        name: table[partner(name)].renamed(name) if partner(name) in table else t
        for name, t in table.items()
    }


def one_value(bits: np.ndarray) -> np.ndarray:
    """Change the last bit but a few of a single number."""
    bits = bits.copy()
    bits.reshape(-1)[7] *= np.float32(1.05)
    return bits


def turned_rope(bits: np.ndarray) -> np.ndarray:
    """Order a head's rows as another way of RoPE has them."""
    return bits.reshape(-1, 2, 8, *bits.shape[1:]).swapaxes(1, 2).reshape(bits.shape)


def cut_off(bits: np.ndarray, source: str, target: str) -> np.ndarray:
    if (source, target) == ("F32", "BF16"):
        return (np.ascontiguousarray(bits).view(np.uint32) >> 16).astype(np.uint16)
    return REAL_CAST(bits, source, target)


REAL_CAST = tensors.cast_bits


def patched(module: Any, name: str, make: Callable[[Any], Any]) -> Callable[[Patch], None]:
    return lambda monkeypatch: monkeypatch.setattr(module, name, make(getattr(module, name)))


def field(**changes: Any) -> Callable[[Patch], None]:
    """Change fields of the config as the conversion reads it."""
    return patched(plan, "base_config", lambda real: lambda *given: {**real(*given), **changes})


def stream_field(**changes: Any) -> Callable[[Patch], None]:
    return patched(
        adapters,
        "stream_config",
        lambda real: lambda *given: dataclasses.replace(real(*given), **changes),
    )


def reshaped(tensor: Tensor) -> Tensor:
    """Give (a, b) the shape (b, a) without turning it."""
    shape = tensor.shape[::-1]
    turned = changed(tensor, lambda bits: bits.reshape(shape))
    return dataclasses.replace(turned, shape=shape)


def roll_groups(real: Any) -> Any:
    """Quantise with the scales of the neighbouring rows."""

    def quantised(tensor: Tensor, parts: Any, layer: Any) -> Tensor:
        done = real(tensor, parts, layer)
        inner = done.quantise
        assert inner is not None

        def quantise(bits: np.ndarray) -> list[np.ndarray]:
            weight, scales, *rest = inner(bits)
            return [weight, np.roll(scales, 1, axis=0), *rest]

        return dataclasses.replace(done, quantise=quantise)

    return quantised


WRONG_BASES: dict[str, tuple[Callable[[Patch], None], str]] = {
    "two layers exchanged": (after_sorting(lambda own, s: (swapped(own, "layers.0.", "layers.1."), s)), ""),
    "keys for values": (after_sorting(lambda own, s: (swapped(own, ".k_proj.", ".v_proj."), s)), ""),
    "gate for up": (after_sorting(lambda own, s: (swapped(own, ".gate_proj.", ".up_proj."), s)), ""),
    "norms exchanged": (
        after_sorting(lambda own, s: (swapped(own, "0.input_layernorm", "0.post_attention_layernorm"), s)), "",
    ),
    "a square matrix turned": (base_values("1.self_attn.o_proj", lambda b: np.ascontiguousarray(b.T)), ""),
    "rows of heads in another order": (base_values("q_proj", turned_rope), "q_proj"),
    "norms one larger": (base_values("norm", lambda b: b + np.float32(1)), ""),
    "biases left out": (base_values(".bias", np.zeros_like), ".bias"),
    "a small bias left out": (base_values("2.self_attn.v_proj.bias", one_value), ".bias"),
    "one number off by a twentieth": (base_values("1.mlp.up_proj", one_value), ""),
    "embeddings shifted by a token": (base_values("embed_tokens", lambda b: np.roll(b, 1, axis=0)), ""),
    "cut off where rounded": (
        lambda m: m.setattr(tensors, "cast_bits", cut_off), "bfloat16",
    ),
    "scales of the row above": (patched(Tensor, "quantised", roll_groups), "quantised"),
    "another epsilon": (field(rms_norm_eps=2e-6), ""),
    "RoPE's usual base": (field(rope_theta=10000.0), ""),
    "a head tied that is not": (
        patched(base, "_with_tying", lambda _: lambda config, own, _: ({**config, "tie_word_embeddings": True}, own)),
        "llama",
    ),
}  # fmt: skip
SOURCES = {"llama": in_one_file, "qwen2": in_safetensors, "gemma2": in_two_files}
FIELDS = {"gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}}


@pytest.mark.parametrize("family", SOURCES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_right_passes(tmp_path: Path, family: str, kind: str) -> None:
    proof = prove(tmp_path, alone(tmp_path, family, SOURCES[family]), **KINDS[kind])
    assert proof.passed, proof.report()


@pytest.mark.parametrize("way", WRONG_BASES)
def test_a_wrong_base_never_passes(tmp_path: Path, monkeypatch: Patch, way: str) -> None:
    """In every type it could be hidden by; families and files take turns."""
    patch, only = WRONG_BASES[way]
    family = (
        "qwen2" if only == ".bias" else only if only in SOURCES else list(SOURCES)[len(way) % 3]
    )
    kinds = [only] if only in KINDS else ["float32", "bfloat16", "quantised"]
    source = alone(tmp_path, family, SOURCES[family])
    patch(monkeypatch)
    for kind in kinds:
        proof = prove(tmp_path, source, **KINDS[kind])
        assert not proof.passed, (kind, proof.report())
        assert "FAILED: " in proof.report()


WRONG_STREAMS: dict[str, tuple[Callable[[Patch], None], dict[str, Any]]] = {
    "streams shifted by one": (stream_values("stream_embeddings", lambda b: np.roll(b, 1, axis=0)), {}),
    "adapters scaled twice": (stream_values("lora_b", lambda b: b * np.float32(2)), {}),
    "half the scale": (stream_field(lora_alpha=4.0), {}),
    "the conditioner's tokens reversed": (
        stream_values("mlp_in", lambda b: np.concatenate([b[:, 64:128], b[:, :64], b[:, 128:]], axis=1)), {},
    ),
    "adapters of two layers exchanged": (
        after_sorting(lambda own, s: (own, swapped(s, "layers.1.", "layers.2."))), {},
    ),
    "the next token's map for the streams' start": (
        after_sorting(lambda own, s: (own, swapped(s, "stream_init.", "next_token."))),
        {"next_token_rank": 2},
    ),
    "a pruner that prunes nothing": (stream_values("pruner.lora_b", np.zeros_like), {}),
    "adapters reshaped, not turned": (patched(Tensor, "transposed", lambda _: reshaped), {}),
    "positions of main": (stream_field(rope_offset="position"), {}),
    "values not rotated": (stream_field(value_rotation=0.0), {"value_rotation": 0.3}),
    "one number of an adapter": (stream_values("2.mlp.down_proj.lora_b", one_value), {}),
}  # fmt: skip


@pytest.mark.parametrize("way", WRONG_STREAMS)
def test_wrong_streams_never_pass(tmp_path: Path, monkeypatch: Patch, way: str) -> None:
    patch, changes = WRONG_STREAMS[way]
    family, layout = [("llama", in_one_file), ("qwen3", in_two_files)][len(way) % 2]
    source = with_streams(tmp_path, family, layout, **changes)
    if len(way) % 3 == 0:
        state = load_file(source / "stream_model.safetensors")
        (source / "stream_model.safetensors").unlink()
        torch.save(state, source / "stream_model.pt")
    assert prove(tmp_path, source).passed
    patch(monkeypatch)
    for kind in ("float32", "bfloat16", "quantised"):
        proof = prove(tmp_path, source, **KINDS[kind])
        assert not proof.passed, (kind, proof.report())


def twice(real: Any) -> Any:
    return lambda named, rank, scale: real(named, rank, 2 * scale)


def onto_the_next_layer(real: Any) -> Any:
    def deltas(*given: Any) -> Any:
        pairs = {n: pair for n, pair in real(*given).items() if "layers.2." not in n}
        return {n.replace("layers.1.", "layers.2."): pair for n, pair in pairs.items()}

    return deltas


@pytest.mark.parametrize("make", [twice, onto_the_next_layer])
def test_a_wrong_merge_never_passes(tmp_path: Path, monkeypatch: Patch, make: Any) -> None:
    folder = made.save_base(tmp_path / "base")
    peft_model(folder).save_pretrained(tmp_path / "in")
    for kind in ("float32", "bfloat16", "quantised"):
        assert prove(tmp_path, tmp_path / "in", **KINDS[kind]).passed
    patched(adapters, "lora_deltas", make)(monkeypatch)
    for kind in ("float32", "bfloat16", "quantised"):
        proof = prove(tmp_path, tmp_path / "in", **KINDS[kind])
        assert not proof.passed, (kind, proof.report())


@pytest.mark.parametrize("order", [("k_proj", "q_proj", "v_proj"), ("q_proj", "v_proj", "k_proj")])
def test_rows_cut_out_in_another_order_never_pass(
    tmp_path: Path, monkeypatch: Patch, order: tuple[str, ...]
) -> None:
    layout_fused(tmp_path / "in")
    assert prove(tmp_path, tmp_path / "in").passed
    monkeypatch.setitem(names.FUSED, "qkv_proj", order)
    for kind in ("float32", "quantised"):
        assert not prove(tmp_path, tmp_path / "in", **KINDS[kind]).passed


def test_gates_that_were_lost_never_pass(tmp_path: Path, monkeypatch: Patch) -> None:
    source = with_streams(tmp_path, "llama", in_safetensors, mode="shared")
    state = load_file(source / "stream_model.safetensors")
    for i in (1, 2):
        state[f"base_model.model.model.layers.{i}.stream_gate"] = torch.randn(4)
    save_file(state, source / "stream_model.safetensors")
    assert prove(tmp_path, source).passed
    stream_values("stream_gate", np.zeros_like)(monkeypatch)
    for kind in ("float32", "quantised"):
        assert not prove(tmp_path, source, **KINDS[kind]).passed


def test_what_is_not_finite_is_beyond_every_bound() -> None:
    from mlx_specstream.convert.check import Findings

    for value in (np.nan, np.inf):
        found = Findings()
        found.error("main logits", np.array([1.0, value]), np.zeros(2))
        found.error("main logits", np.zeros(2), np.zeros(2))
        assert found.beyond
        assert not found.is_exact


def test_names_by_a_users_rules_are_proved_too(tmp_path: Path) -> None:
    folder = alone(tmp_path, "llama", in_safetensors)
    state = {
        f"net.{n.removeprefix('model.')}": t
        for n, t in load_file(folder / "model.safetensors").items()
    }
    save_file(state, folder / "model.safetensors")
    rules = tmp_path / "rules.json"
    rules.write_text(
        json.dumps({"rename": [["net\\.(lm_head.+)", "\\1"], ["net\\.(.+)", "model.\\1"]]})
    )
    assert prove(tmp_path, folder, rules=rules).passed
