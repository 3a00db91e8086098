"""Behind a long text, at once or in two calls: identical, or said where not."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from benchmarks import long_context
from mlx_specstream.errors import OptionError
from tests.support import tiny
from tests.support.scripted import save_random_streams

SIZES = ["--context", "70", "--max-tokens", "12"]


@pytest.fixture(scope="module")
def bench_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Heads of 32, which a group of quantised values divides."""
    folder, sizes = tmp_path_factory.mktemp("long") / "tiny", {"head_dim": 32}
    tiny.save_tiny_model(folder, num_hidden_layers=2, **sizes)
    model = tiny.tiny_model(num_hidden_layers=2, **sizes)
    return str(save_random_streams(folder, model, num_msa_layers=1))


@pytest.mark.parametrize(
    "cache",
    [
        ["--max-kv-size", "16"],
        ["--kv-bits", "4", "--kv-group-size", "32", "--quantized-kv-start", "40"],
    ],
)
def test_at_once_and_in_two_calls(
    bench_model: str, tmp_path: Path, cache: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", bench_model, *SIZES, *cache]
    assert long_context.main(words) == 0
    at_once = capsys.readouterr().out
    assert "identical: 12 tokens behind 70" in at_once

    kept = ["--reference", str(tmp_path / "said.safetensors")]
    assert long_context.main([*words, *kept]) == 0
    assert "speculation" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["said.safetensors"]
    assert long_context.main([*words, *kept]) == 0
    said = capsys.readouterr().out
    assert "identical: 12 tokens behind 70" in said
    assert "mlx-lm:" not in said


def test_another_reference(bench_model: str, tmp_path: Path) -> None:
    path = tmp_path / "said.safetensors"
    words = ["--model", bench_model, *SIZES, "--reference", str(path)]
    assert long_context.main(words) == 0
    with pytest.raises(OptionError, match="another text"):
        long_context.main([*words, "--context", "60"])
    mx.save_safetensors(str(path), {"x": mx.zeros(1)})
    with pytest.raises(OptionError, match="holds no answer"):
        long_context.main(words)


def test_a_token_that_differs_is_found(
    bench_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "said.safetensors"
    words = ["--model", bench_model, *SIZES, "--reference", str(path)]
    assert long_context.main(words) == 0
    arrays = mx.load(str(path))
    arrays["tokens"][3] = (arrays["tokens"][3] + 1) % 256
    mx.eval(arrays)
    mx.save_safetensors(str(path), arrays)
    assert long_context.main(words) == 1
    assert ": a mismatch" in capsys.readouterr().out
