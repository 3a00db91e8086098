"""The chunked head loss, the sampled vocabulary and the weights of the streams."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from mlx_specstream.convert.pytorch import loss as loss_module  # noqa: E402
from mlx_specstream.convert.pytorch.loss import HeadCrossEntropy, VocabularySampler, stream_weights  # noqa: E402


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


def test_a_whole_vocabulary_needs_no_correction():
    sampler = VocabularySampler(20, [[1, 1, 2]], num_frequent=2, num_random=100)
    drawn = sampler.draw(torch.tensor([5, 5, 7]), seed=0)
    assert sorted(drawn.ids.tolist()) == list(range(20))
    assert (drawn.log_weight == 0).all()


def test_the_sampled_partition_sum_is_unbiased():
    torch.manual_seed(1)
    logits = torch.randn(400)
    sampler = VocabularySampler(400, [[1, 2, 3]], num_frequent=3, num_random=40)
    sums = []
    for seed in range(300):
        drawn = sampler.draw(torch.tensor([9, 11]), seed)
        assert (drawn.index[drawn.ids] == torch.arange(len(drawn.ids))).all()
        assert drawn.index[torch.tensor([9, 11, 1, 2, 3])].min() >= 0
        sums.append((logits[drawn.ids] + drawn.log_weight).exp().sum())
    assert torch.stack(sums).mean() == pytest.approx(float(logits.exp().sum()), rel=0.03)


def test_stream_weights_decay_and_ignore_invalid_rows():
    valid = torch.tensor([[True, True], [True, False], [True, False], [True, False]])
    weights = stream_weights(valid, 0.8)
    assert weights.sum() == pytest.approx(1.0)
    assert weights[:, 1].sum() / weights[:, 0].sum() == pytest.approx(0.8)
    assert (weights[1:, 1] == 0).all()
