"""Gradients of stream attention, segments and losses against a plain float64 implementation."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_specstream.config import TreeSpec
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.cache import KVCache
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.step import Stepper
from mlx_specstream.speculation.streams import Streams
from mlx_specstream.speculation.tree import root_only
from mlx_specstream.train.base import base_states, pad_texts
from mlx_specstream.train.head import Head, cross_entropy
from mlx_specstream.train.segments import cut, stream_states
from mlx_specstream.train.targets import stream_weights, target_counts
from mlx_specstream.train.vocabulary import VocabularySampler
from tests.support.engine import random_tensors, small_model, stream_config
from tests.support.tiny import tiny_model
from tests.train.plain import assert_close, everything, some_texts, whole_loss

VARIANTS = [
    {},
    {"rope_offset": "position"},
    {"next_token_rank": 3, "conditioner_tokens": 2},
    {"value_rotation": 0.05},
    {"stream_init_rank": 0, "conditioner_rank": 0, "conditioner_hidden": 0},
    {"num_streams": 1, "num_msa_layers": 1},
]


@pytest.mark.parametrize("soft", [0.0, 0.6])
@pytest.mark.parametrize("fields", VARIANTS)
def test_loss_and_gradients_equal_a_plain_implementation(fields, soft) -> None:
    torch = pytest.importorskip("torch")
    from tests.reference.plain_streams import PlainModel

    model = small_model(layers=3)
    config = stream_config(pruner_rank=0, **fields)
    tensors = random_tensors(Backbone(model), config)
    batch = everything(some_texts())
    value, gradients = whole_loss(model, config, tensors, batch, soft=soft)

    doubles = {
        name: torch.tensor(np.array(t), dtype=torch.float64, requires_grad=True)
        for name, t in tensors.items()
    }
    plain = PlainModel(model, config, doubles)
    weights = stream_weights(target_counts(batch, config.num_streams), 0.8)
    total = sum(plain.loss(s.example.tokens, s.positions, weights, soft) for s in batch)
    total.backward()
    assert value == pytest.approx(total.item(), rel=2e-6)
    expected = {name: t.grad.numpy() for name, t in doubles.items()}
    assert_close(gradients, expected, 5e-5)


@pytest.mark.parametrize(
    "options", [{"size": 1}, {"size": 16}, {"passes": 4}, {"checkpoint": True}]
)
def test_segments_are_exact(options) -> None:
    model = small_model(layers=3)
    config = stream_config(pruner_rank=0)
    tensors = random_tensors(Backbone(model), config)
    batch = everything(some_texts(lengths=(19, 8, 6)))
    value, gradients = whole_loss(model, config, tensors, batch, soft=0.3)
    other, others = whole_loss(model, config, tensors, batch, soft=0.3, **options)
    assert other == pytest.approx(value, rel=1e-6)
    assert_close(others, gradients, 2e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("fields", VARIANTS[:4])
def test_the_training_forward_is_the_engines(family, fields) -> None:
    model = small_model(family, layers=3)
    if family == "mistral":
        types = ["full_attention", "sliding_attention", "full_attention"]
        sizes = {"num_hidden_layers": 3, "vocab_size": 12}
        model = tiny_model(family, sliding_window=4, layer_types=types, **sizes)
    config = stream_config(pruner_rank=0, **fields)
    backbone = Backbone(model)
    streams = Streams(backbone, config, random_tensors(backbone, config))
    batch = everything(some_texts())
    base = base_states(
        backbone, pad_texts([s.example.tokens for s in batch]), config.num_msa_layers
    )
    segments = cut([s.positions for s in batch], 2)
    states = stream_states(streams, base, segments)
    stepper = Stepper(
        streams, TreeSpec("chain", branching=1), inline=True, token_sampler=TokenSampler()
    )
    for n in range(len(segments)):
        tokens = batch[segments.text[n]].example.tokens
        for p, t in enumerate(segments.positions[n]):
            cache = KVCache(backbone.num_layers)
            backbone.forward(mx.array(tokens[:t]), cache)
            cache.advance(int(t))
            following = mx.array([tokens[t + 1]])
            verified = stepper.verify(root_only(mx.array([tokens[t]])), cache, following)
            expected = backbone.norm(verified.streams)[0, 0]
            assert mx.allclose(states[n, p], expected, atol=2e-5), (n, p)
            assert mx.allclose(
                base.last[int(segments.text[n]), int(t)], verified.last[0, 0], atol=2e-5
            )


def test_cross_entropy_is_the_plain_one_and_sees_a_sampled_vocabulary() -> None:
    backbone = Backbone(small_model(vocab=40))
    random = np.random.default_rng(0)
    hidden, teacher = (mx.array(random.normal(size=(7, 32)).astype(np.float32)) for _ in range(2))
    targets = random.integers(0, 40, 7).astype(np.int32)
    weights = random.uniform(size=7).astype(np.float32)

    def plain(hidden: mx.array) -> mx.array:
        logits, wanted = (backbone.head(x[None])[0] for x in (hidden, teacher))
        scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        hard = -mx.take_along_axis(scores, mx.array(targets)[:, None], axis=-1)[:, 0]
        soft = -(mx.softmax(wanted, axis=-1) * scores).sum(-1)
        return ((0.75 * hard + 0.25 * soft) * mx.array(weights)).sum() * 3

    def ours(hidden: mx.array, head: Head) -> mx.array:
        return cross_entropy(hidden, head, targets, weights, teacher, 0.25)[0] * 3

    expected, slope = mx.value_and_grad(plain)(hidden)
    assert VocabularySampler.of_size(backbone.vocab_size, [], 0).draw(targets, (0,)) is None
    value, found = mx.value_and_grad(ours)(hidden, Head.of(backbone, None))
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert mx.allclose(found, slope, atol=1e-5)

    # Sampled: every target is known, and the estimate is right on average.
    sampler = VocabularySampler.of_size(backbone.vocab_size, [[1, 2, 3]], 20)
    head = Head.of(backbone, sampler.draw(targets, (0,)))
    known = np.flatnonzero(head.place)
    assert set(targets) - {0} <= set(known)
    assert set(known) >= {2, 3} - {int(head.rows.shape[0])}
    sums = []
    for seed in range(200):
        head = Head.of(backbone, sampler.draw(targets, (seed,)))
        sums.append(np.array(mx.exp(head.scores(head.logits(hidden))).sum(-1)))
    exact = np.array(mx.exp(backbone.head(hidden[None])[0]).sum(-1))
    assert np.mean(sums, axis=0) == pytest.approx(exact, rel=0.1)
