"""The trainer's fast forward and its hand-written gradients against the reference and autograd."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mlx_specstream.convert.pytorch.kernels import GatedSiLU, RMSNorm  # noqa: E402
from mlx_specstream.convert.pytorch.model import SpeculativeModel  # noqa: E402
from mlx_specstream.convert.pytorch.objectives import Common, TorchLossless  # noqa: E402
from mlx_specstream.convert.pytorch.packed import PackedBatch, PackedStreams  # noqa: E402
from mlx_specstream.convert.pytorch.states import compute_states  # noqa: E402
from mlx_specstream.errors import DataError  # noqa: E402
from mlx_specstream.train.batches import Selection  # noqa: E402
from mlx_specstream.train.vocabulary import VocabularySampler  # noqa: E402
from tests.convert.pytorch.conftest import example_of  # noqa: E402

TEXTS = [([5, 17, 3], [44, 60, 9, 71]), ([23, 12], [8, 30, 31, 32, 33, 90])]
ROWS = [[0, 2], [1, 2, 5]]


def packed_batch(backbone, texts=TEXTS, rows=ROWS):
    states = [compute_states(backbone, prompt, answer, 2) for prompt, answer in texts]
    return PackedBatch(
        states,
        [torch.tensor(r) for r in rows],
        [len(prompt) - 1 for prompt, _ in texts],
        torch.tensor([answer[i] for (_, answer), r in zip(texts, rows, strict=True) for i in r]),
    )


def reference(backbone, adapters):
    model = SpeculativeModel(backbone, adapters)
    parts = [
        model.forward(
            torch.tensor([p + a]),
            torch.tensor(r) + len(p) - 1,
            following=torch.tensor([[a[i] for i in r]]),
        ).streams[0]
        for (p, a), r in zip(TEXTS, ROWS, strict=True)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"value_rotation": 0.1, "stream_init_rank": 3, "rope_offset": "position"},
        {"next_token_rank": 3},
    ],
    ids=str,
)
def test_forward_and_gradients_are_the_reference_s(family, changes, make_backbone, make_adapters):
    backbone = make_backbone(family)
    backbone.config.sliding_window = (
        None if family == "mistral" else getattr(backbone.config, "sliding_window", None)
    )
    adapters = make_adapters(backbone, **changes)
    grads, outputs = [], []
    weights = None
    for run in (
        lambda: PackedStreams(backbone, adapters).forward(packed_batch(backbone)),
        lambda: reference(backbone, adapters),
    ):
        adapters.zero_grad()
        out = run()
        weights = (
            torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
            if weights is None
            else weights
        )
        (out * weights).sum().backward()
        outputs.append(out.detach())
        grads.append(
            {name: p.grad.clone() for name, p in adapters.named_parameters() if p.grad is not None}
        )
    torch.testing.assert_close(*outputs, atol=2e-4, rtol=1e-4)
    assert grads[0].keys() == grads[1].keys()
    for name, expected in grads[1].items():
        assert (grads[0][name] - expected).norm() <= 1e-4 * expected.norm() + 1e-6, name


def test_some_modules_may_have_no_adapter(make_backbone, make_adapters):
    backbone = make_backbone()
    adapters = make_adapters(
        backbone, target_modules=("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    )
    with torch.no_grad():
        out = PackedStreams(backbone, adapters).forward(packed_batch(backbone))
        torch.testing.assert_close(out, reference(backbone, adapters), atol=2e-4, rtol=1e-4)


def test_a_text_beyond_the_sliding_window_is_refused(make_backbone, make_adapters):
    backbone = make_backbone("mistral")
    with pytest.raises(DataError, match="window of 6"):
        PackedStreams(backbone, make_adapters(backbone)).forward(packed_batch(backbone))


def test_the_loss_of_one_batch_can_be_learned(make_backbone, make_adapters):
    backbone = make_backbone()
    adapters = make_adapters(backbone, conditioner_rank=4, conditioner_hidden=8)
    batch = [
        Selection(
            example_of(("t", i), tuple(p), tuple(a)), tuple(range(len(p) - 1, len(p) + len(a) - 2))
        )
        for i, (p, a) in enumerate(TEXTS)
    ]
    sampler = VocabularySampler.of(backbone.vocab_size, [], num_frequent=0, num_random=1000)
    common = Common(
        backbone, adapters, sampler, lambda e: compute_states(backbone, e.prompt, e.answer, 2)
    )
    objective = TorchLossless(common)
    optimizer, losses = torch.optim.Adam(adapters.parameters(), lr=0.02), []
    for step in range(60):
        optimizer.zero_grad()
        total, figures = objective.loss(batch, (0, step))
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    assert losses[-1] < 0.2 * losses[0]
    assert len(figures["conditioned_loss"]) == 3
    assert objective.evaluate(batch)["conditioned_chain"] > 2


def test_hand_written_derivatives():
    torch.manual_seed(0)
    weight = torch.rand(6, dtype=torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GatedSiLU.apply, (x,))

    assert torch.autograd.gradcheck(lambda y: RMSNorm.apply(y, weight, 1e-5), (x,))
    expected = weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(RMSNorm.apply(x, weight, 1e-5), expected)
