"""`specstream doctor`: this machine, another one, a model before it is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_specstream import cli
from mlx_specstream.convert.hub import locate
from mlx_specstream.doctor import sizes
from mlx_specstream.doctor.sizes import TYPICAL, read_shape, shape_of, usable_bytes
from mlx_specstream.errors import ModelError, OptionError
from mlx_specstream.machine import Machine
from tests.support import tiny

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def model_folder(folder: Path, **changes: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA_8B, **changes}))
    return str(folder)


def doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    status = cli.main(["doctor", *words])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out = doctor(capsys)
    assert "MLX computes" in out
    assert "Llama-3.1-8B" in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_machine_described_elsewhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, out = doctor(capsys, "--json")
    values = json.loads(out)
    values["machine"] |= {
        "system": "Darwin", "os_version": "26.3", "arch": "arm64", "chip": "Apple M1",
        "backend": "metal", "gpu": "applegpu_g13g", "memory_bytes": 8 << 30, "blas": "",
        "working_set_bytes": 5_726_633_984,
    }  # fmt: skip
    path = tmp_path / "m1.json"
    path.write_text(json.dumps(values))
    status, out = doctor(capsys, "--machine", str(path), "--json")
    found = json.loads(out)
    fits = {one["name"]: one["fits"]["4"]["fits"] for one in found["models"]}
    assert (fits["Llama-3.2-3B"], fits["Llama-3.1-8B"]) == (True, False)
    assert any("gain little" in one["what"] for one in found["findings"])
    assert status == 0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"machine": 3}', '{"machine": {"cores": "x"}}'])
def test_odd_descriptions(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    status, out = doctor(capsys, "--machine", str(path))
    assert status in (1, 2)
    assert ("is not supported" if '"cores"' in text else "describes no machine") in out


def test_a_model_that_does_not_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    machine = tmp_path / "machine.json"
    machine.write_text(json.dumps({"machine": {"system": "Linux", "memory_bytes": 12 * 10**9}}))
    model = model_folder(tmp_path / "big")
    status, out = doctor(capsys, "--machine", str(machine), "--model", model)
    assert status == 1
    assert "big in 16 bits takes 18.1 GB" in " ".join(out.split())
    assert "take it in 8 bits" in out
    quantised = model_folder(tmp_path / "small", quantization={"bits": 4, "group_size": 64})
    _, out = doctor(capsys, "--machine", str(machine), "--model", quantised, "--json")
    assert json.loads(out)["models"][-1]["stored_bits"] == 4
    assert "takes" not in out


def test_a_family_that_is_not_supported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = model_folder(tmp_path / "new", model_type="brandnew", intermediate_size=128)
    status, out = doctor(capsys, "--model", model)
    assert status == 1
    assert "models of type brandnew are not supported" in " ".join(out.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[1]", "is no model's"), ('{"hidden_size": "x"}', "hidden_size")],
)
def test_odd_configs(
    text: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(text)
    status, out = doctor(capsys, "--model", str(tmp_path))
    assert status == 2
    assert message in out


def test_only_the_config_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "8b")
    asked: list[object] = []

    def fetch(name: str, *_: object, patterns: object) -> Path:
        asked.append(patterns)
        return Path(folder)

    monkeypatch.setattr(sizes, "fetch", fetch)
    assert read_shape("someone/8b").num_params == TYPICAL[5].num_params
    assert asked == [("config.json",)]


@pytest.mark.parametrize("name", ["demo", "gemma3-270m"])
def test_models_that_come_with_the_product_are_known_by_name(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = Path(model_folder(tmp_path / "8b"))
    for resolve in ("resolve_demo", "resolve_gemma"):
        monkeypatch.setattr(f"mlx_specstream.loading.folders.{resolve}", lambda: folder)
    _, out = doctor(capsys, "--model", name, "--json")
    assert [model for model in json.loads(out)["models"] if model["name"] == name]
    assert locate(name) == folder
    with pytest.raises(OptionError, match="revision"):
        locate(name, revision="main")


def test_sizes_are_those_of_the_real_weights() -> None:
    from mlx.utils import tree_flatten

    config = tiny.tiny_config("llama")
    model = tiny.tiny_model("llama")
    weights = sum(a.size for _, a in tree_flatten(model.parameters()) if a.ndim > 1)  # type: ignore[union-attr]
    shape = shape_of("tiny", config)
    assert shape.num_params == weights
    assert shape.weight_bytes(16) == 2 * weights
    assert shape.weight_bytes(4) == weights * 4.5 / 8
    assert shape.cache_bytes(10) == 10 * 2 * 4 * 2 * 16 * 2


def test_a_config_within_a_config() -> None:
    assert shape_of("vlm", {"model_type": "x", "text_config": LLAMA_8B}).family == "llama"
    with pytest.raises(ModelError, match="vocab_size"):
        shape_of("odd", {**LLAMA_8B, "vocab_size": True})


def test_usable_memory() -> None:
    mac = Machine(system="Darwin", memory_bytes=24_000_000_000)
    assert usable_bytes(mac) == 16_000_000_000
    assert usable_bytes(Machine(system="Darwin", working_set_bytes=5)) == 5
    assert usable_bytes(Machine()) == 0


def test_what_a_model_should_gain(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    machine = tmp_path / "m4.json"
    mac = {
        "system": "Darwin", "os_version": "26.3", "arch": "arm64", "chip": "Apple M4 Pro",
        "backend": "metal", "gpu": "applegpu_g16s", "memory_bytes": 48 << 30,
    }  # fmt: skip
    machine.write_text(json.dumps({"machine": mac}))
    model = model_folder(tmp_path / "eight")
    _, out = doctor(capsys, "--machine", str(machine), "--model", model, "--json")
    (found,) = json.loads(out)["expected"]
    assert (found["model"], found["bits"]) == ("eight", 16)
    # 8 billion weights of two bytes at 0.8 of 273 GB/s.
    assert found["plain_tokens_s"] == pytest.approx(0.8 * 273e9 / (2 * 8.03e9), rel=0.1)
    assert all(speedup >= 1 for _, speedup in found["by_task"].values())
    assert "not measured" in found["label"]
    _, out = doctor(capsys, "--machine", str(machine))
    assert "Expected, a prediction" in out
    assert max(map(len, out.splitlines())) <= 80
    machine.write_text(json.dumps({"machine": {**mac, "chip": "Apple M9"}}))
    _, out = doctor(capsys, "--machine", str(machine))
    assert "Expected" not in out
