"""Shared mode's fast forward against the one-mask reference: values, gradients, shared beginnings, the gate."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


from mlx_specstream.convert.pytorch.adapters import grow, resize  # noqa: E402
from mlx_specstream.convert.pytorch.backbone import SUPPORTED_FAMILIES  # noqa: E402
from mlx_specstream.convert.pytorch.joint import JointStreams, families  # noqa: E402
from mlx_specstream.convert.pytorch.model import SpeculativeModel  # noqa: E402
from mlx_specstream.errors import DataError  # noqa: E402
from mlx_specstream.train.batches import grouped  # noqa: E402
from mlx_specstream.train.data import Example  # noqa: E402
from tests.convert.pytorch.conftest import example_of, tiny_adapters, tiny_backbone  # noqa: E402

SCHEMA, OTHER = (5, 6, 7, 8, 9, 10), (40, 41, 42, 43, 44, 45)
TEXTS = [
    example_of(("a", 0), (*SCHEMA, 11, 12), (20, 21, 22, 2)),
    example_of(("a", 1), (*OTHER, 11), (30, 31, 2)),
    example_of(("a", 2), (*SCHEMA, 13), (23, 24, 25, 26, 2)),
    example_of(("a", 3), SCHEMA, (27, 28, 2)),
]


def reference(model: SpeculativeModel, text: Example):
    first = len(text.prompt) - 1
    ids = torch.tensor([[*text.prompt, *text.answer[:-1]]])
    out = model.forward(ids, torch.arange(first, first + len(text.answer)))
    return out.main[0, first:], out.streams[0]


def test_texts_share_what_their_prompts_begin_with():
    found = families(TEXTS)
    assert [(f.prefix, [b.number for b in f.branches]) for f in found] == [
        (SCHEMA[:-1], [3, 0, 2]),
        (OTHER, [1]),
    ]
    assert found[0].branches[1].own == (10, 11, 12, 20, 21, 22)
    assert found[0].branches[1].num_streamed == 4


@pytest.mark.parametrize("family", [f for f in SUPPORTED_FAMILIES if f != "mistral"])
def test_rows_and_gradients_are_the_reference_s(family):
    backbone = tiny_backbone(family)
    adapters = tiny_adapters(backbone, mode="shared", value_rotation=0.05)
    model = SpeculativeModel(backbone, adapters)
    found = []
    for fast in (True, False):
        adapters.zero_grad()
        if fast:
            out = JointStreams(backbone, adapters).forward(TEXTS)
            main, streams = out.main, out.streams
        else:
            parts = [reference(model, text) for text in TEXTS]
            main, streams = (torch.cat(part) for part in zip(*parts, strict=True))
        ramp = torch.linspace(-1, 1, main.shape[-1])
        ((main * ramp).sum() + (streams * ramp.flip(0)).pow(2).sum()).backward()
        trained = {n: p.grad.clone() for n, p in adapters.named_parameters() if p.grad is not None}
        found.append({"main": main.detach(), "streams": streams.detach(), **trained})
    assert found[0].keys() == found[1].keys()
    assert "lora.0.mlp/down_proj.lora_B.weight" in found[0]
    for name, wanted in found[1].items():
        scale = wanted.abs().max()
        torch.testing.assert_close(found[0][name] / scale, wanted / scale, rtol=0, atol=2e-4)


def test_a_closed_gate_and_no_streams_are_plain_lora():
    backbone = tiny_backbone()
    adapters = tiny_adapters(backbone, mode="shared")
    opened = JointStreams(backbone, adapters).forward(TEXTS).main
    closed = JointStreams(backbone, adapters).forward(TEXTS, opening=-1e4).main
    plain = JointStreams(backbone, adapters, streams=False).forward(TEXTS)
    assert plain.streams is None
    torch.testing.assert_close(closed, plain.main, rtol=1e-4, atol=1e-5)
    assert (opened - plain.main).abs().max() > 1e-3


def test_a_text_beyond_the_window_is_refused():
    backbone = tiny_backbone("mistral")
    with pytest.raises(DataError, match="window of 6"):
        JointStreams(backbone, tiny_adapters(backbone, mode="shared")).forward(TEXTS)


def test_groups_hold_every_text_once():
    texts = [example_of(("g", i), (*range(5, 15), 20 + i), (3, 2)) for i in range(7)]
    texts += [example_of(("h", i), (*range(50, 60), 20 + i), (3, 2)) for i in range(5)]
    order = grouped(texts, 3, (0,))
    assert sorted(e.key for e in order) == sorted(e.key for e in texts)
    assert order != grouped(texts, 3, (1,))
    changes = sum(a.key[0] != b.key[0] for a, b in itertools.pairwise(order))
    assert changes <= 4  # five runs of at most three


def test_a_resized_adapter_is_the_best_of_its_rank():
    torch.manual_seed(0)
    a, b = torch.randn(4, 10), torch.randn(12, 4)
    wide = resize(a, b, torch.randn(6, 10), torch.zeros(12, 6))
    torch.testing.assert_close(wide[1] @ wide[0], b @ a, rtol=1e-4, atol=1e-4)
    small = resize(a, b, torch.randn(2, 10), torch.zeros(12, 2))
    values = torch.linalg.svdvals(b @ a)
    error = torch.linalg.matrix_norm(small[1] @ small[0] - b @ a)
    torch.testing.assert_close(error, values[2:].square().sum().sqrt(), rtol=1e-3, atol=1e-3)


def test_shared_mode_starts_from_lossless_streams():
    backbone = tiny_backbone()
    lossless = tiny_adapters(backbone)
    shared = grow(lossless, backbone, mode="shared", lora_rank=6)
    assert shared.config.lora_alpha / 6 == lossless.config.lora_alpha / 4
    top, name = len(backbone.layers) - 1, "mlp.up_proj"
    before, after = lossless.delta(top, name), shared.delta(top, name)
    x = torch.randn(3, backbone.hidden_size)
    torch.testing.assert_close(after(x), before(x), rtol=1e-4, atol=1e-5)
    assert shared.delta(0, name)(x).abs().max() == 0
