"""The chunked head loss, with the whole vocabulary and a sampled one."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mlx_specstream.convert.pytorch import loss as loss_module  # noqa: E402
from mlx_specstream.convert.pytorch.loss import HeadCrossEntropy, TorchHead  # noqa: E402
from mlx_specstream.train.vocabulary import VocabularySampler  # noqa: E402
from tests.convert.pytorch.conftest import VOCAB, tiny_backbone  # noqa: E402


def test_chunked_cross_entropy_is_the_plain_one(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 4)
    torch.manual_seed(0)
    x = torch.randn(11, 8, requires_grad=True)
    head, bias, weights = torch.randn(30, 8), torch.randn(30), torch.rand(11)
    target = torch.randint(30, (11,))
    total, losses = HeadCrossEntropy.apply(x, head, bias, target, weights)
    (3 * total).backward()
    gradient, x.grad = x.grad, None
    plain = torch.nn.functional.cross_entropy(x @ head.T + bias, target, reduction="none")
    (3 * (plain * weights).sum()).backward()
    torch.testing.assert_close(losses, plain)
    torch.testing.assert_close(total, (plain * weights).sum())
    torch.testing.assert_close(gradient, x.grad)


def test_a_sampled_head_knows_its_targets_and_estimates_the_whole_sum():
    backbone = tiny_backbone()
    sampler = VocabularySampler.of(VOCAB, [[1, 2, 3]], num_frequent=3, num_random=20)
    assert VocabularySampler.of(VOCAB, [], 0, 200).draw(np.array([5]), (0,)) is None
    hidden, targets = torch.randn(2, backbone.hidden_size), np.array([9, 11])
    whole, ones = TorchHead.of(backbone, None), np.ones(2, dtype=np.float32)
    _, exact = whole.cross_entropy(hidden, targets, ones)
    found = []
    for seed in range(300):
        drawn = sampler.draw(targets, (seed,))
        assert drawn.tokens[drawn.place[[9, 11, 1, 2, 3]]].tolist() == [9, 11, 1, 2, 3]
        _, losses = TorchHead.of(backbone, drawn).cross_entropy(hidden, targets, ones)
        found.append(np.exp(losses))
    assert np.mean(found, axis=0) == pytest.approx(np.exp(exact), rel=0.1)
