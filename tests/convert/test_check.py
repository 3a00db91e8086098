"""The proof against PyTorch where the base is quantised already, and where every layer runs streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from mlx_specstream.convert import check_runs, cli  # noqa: E402
from mlx_specstream.convert.check import Proof  # noqa: E402
from mlx_specstream.convert.dequantise import dequantised  # noqa: E402
from mlx_specstream.convert.plan import Options, make_plan  # noqa: E402
from mlx_specstream.convert.writer import write_plan  # noqa: E402
from tests.convert import checkpoints as made  # noqa: E402

MODES = {
    **{
        f"affine-{bits}": ["--q-bits", str(bits), "--q-group-size", "32"]
        for bits in (2, 3, 4, 5, 6, 8)
    },
    **{mode: ["--q-mode", mode] for mode in ("mxfp4", "nvfp4", "mxfp8")},
    "mixed": ["--quant-predicate", "mixed_3_6", "--q-group-size", "32"],
}


@pytest.mark.parametrize(
    ("mode", "group", "bits"),
    [
        *[("affine", group, bits) for group in (32, 128) for bits in (2, 3, 4, 5, 6, 8)],
        *(("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)),
    ],
)
def test_weights_are_dequantised_as_mlx_does(
    tmp_path: Path, mode: str, group: int, bits: int
) -> None:
    weight = mx.random.normal((6, 256), key=mx.random.key(1)) * 3
    parts = mx.quantize(weight, group, bits, mode)
    expected = mx.dequantize(*parts, *([None] if len(parts) < 3 else []), group, bits, mode)
    path = tmp_path / "q.safetensors"
    mx.save_safetensors(str(path), dict(zip("wsb", parts, strict=False)))
    named = load_file(path)
    found = dequantised(named["w"], named["s"], named.get("b"), bits, mode)
    np.testing.assert_array_equal(found.numpy(), np.array(expected.astype(mx.float32)))


@pytest.fixture(scope="module")
def quantised_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    base = made.save_base(folder / "full")
    for name, words in MODES.items():
        given = ["--hf-path", str(base), "--mlx-path", str(folder / name), "-q", *words]
        assert cli.main(given) == 0
    return {name: folder / name for name in MODES}


def proved(tmp_path: Path, base: Path, quantised: Path | None = None, **changes: Any) -> Proof:
    streams = made.save_streams(tmp_path / "streams", base, **changes)
    plan = make_plan(Options(str(streams), base=None if quantised is None else str(quantised)))
    proof = Proof(plan)
    write_plan(plan, tmp_path / "out", prove=proof.figures)
    return proof


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_runs, "NUM_TOKENS", 12)
    monkeypatch.setattr(check_runs, "PROMPTS", check_runs.PROMPTS[:2])


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize("mode", MODES)
def test_a_quantised_base_computes_what_its_numbers_say(
    tmp_path: Path, quantised_bases: dict[str, Path], mode: str
) -> None:
    full = quantised_bases[mode].parent / "full"
    proof = proved(tmp_path, full, quantised_bases[mode])
    assert proof.kind == "F32"
    assert proof.passed, proof.report()
    found = proof.findings
    assert not found.wrong_tokens
    assert found.tokens == 2 * 12
    assert found.errors["main logits"] < 1e-2


@pytest.mark.usefixtures("short_answers")
def test_a_quantised_base_that_was_copied_wrongly_fails(
    tmp_path: Path, quantised_bases: dict[str, Path]
) -> None:
    full = quantised_bases["mxfp4"].parent / "full"
    streams = made.save_streams(tmp_path / "streams", full)
    plan = make_plan(Options(str(streams), base=str(quantised_bases["mxfp4"])))
    proof = Proof(plan)

    def spoilt(folder: Path) -> dict[str, str]:
        (path,) = folder.glob("model*.safetensors")
        tensors = mx.load(str(path))
        assert isinstance(tensors, dict)
        name = "model.layers.1.mlp.up_proj.scales"
        tensors[name] = tensors[name] + mx.array(1, mx.uint8)
        mx.eval(tensors)
        mx.save_safetensors(str(path), tensors, metadata={"format": "mlx"})
        return proof.figures(folder)

    write_plan(plan, tmp_path / "out", prove=spoilt)
    assert not proof.passed
    assert "scales differs from its source" in proof.report()


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize("mode", ["lossless", "shared"])
def test_streams_in_every_layer(tmp_path: Path, mode: str) -> None:
    base = made.save_base(tmp_path / "base")
    proof = proved(tmp_path, base, num_msa_layers=3, mode=mode)
    assert proof.passed, proof.report()
    assert proof.findings.drafts > 10
    assert not proof.findings.wrong_tokens
    assert not proof.findings.wrong_drafts
    assert max(proof.findings.errors.values()) < 1e-3


def test_more_layers_than_there_are(tmp_path: Path) -> None:
    base = made.save_base(tmp_path / "base")
    with pytest.raises(ValueError, match="4 MSA layers are more than the model's 3 layers"):
        made.random_adapters(base, made.stream_config(num_msa_layers=4))
