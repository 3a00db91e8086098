"""The study of a large model, on a small one: what is written loads, what is counted is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from benchmarks.large import decoded, dequantise_rows, loaded, make, read_prompt, section
from mlx_specstream.doctor.sizes import Shape
from tests.support.random_models import filled_cache

SHAPE = Shape("small", 5, 128, 256, 4, 2, 32, 512)


def quantised_bytes(module: nn.Module) -> int:
    leaves: Any = tree_flatten(module.parameters())
    return sum(
        x.nbytes
        for name, x in leaves
        if name.endswith((".weight", ".scales", ".biases")) and "norm" not in name
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("large")
    make(made, SHAPE, mx.float32)
    return made


def test_bytes_are_those_of_the_layers_that_ran(folder: Path) -> None:
    found, model = loaded(folder, streams=True)
    assert model.streams is not None
    assert model.streams.config.num_msa_layers == 2  # four in ten
    assert found["base_bytes"] == pytest.approx(SHAPE.num_params * 5 / 8, rel=0.1)
    each = [quantised_bytes(layer) for layer in model.model.layers]
    head = sum(model.model.lm_head[name].nbytes for name in ("weight", "scales", "biases"))
    context = decoded(model, filled_cache(model.backbone, 64), "chain", 3)
    assert context["plain"]["weight_bytes"] == sum(each) + head
    # The streams' own pass reads the upper layers and the head again.
    assert context["chain"]["weight_bytes"] == sum(each) + head + sum(each[3:]) + head
    text = section(
        {
            **found,
            "context": context,
            "prompt": read_prompt(model, 40),
            "machine": "here",
            "date": "now",
        }
    )
    assert "behind 64 tokens" in text
    assert "a prompt of 40 tokens" in text


def test_dequantised_layers_compute_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = loaded(folder, streams=False)
    tokens = mx.array([[n % 97 for n in range(40)]])
    expected = model(tokens)
    mx.eval(expected)
    monkeypatch.setattr(nn.QuantizedLinear, "__call__", nn.QuantizedLinear.__call__)  # put back
    dequantise_rows(8)
    assert mx.abs(model(tokens) - expected).max().item() < 1e-4
