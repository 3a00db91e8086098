"""Training other drafters: the loss sees what decoding will compute, and training helps."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_specstream import cli, load
from mlx_specstream.config import DecodeConfig, TreeSpec
from mlx_specstream.errors import OptionError
from mlx_specstream.loading.drafter import drafter_in
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.speculation.drafters.trained import trained_drafter
from mlx_specstream.speculation.drafting import drafter_decoder
from mlx_specstream.speculation.result import MaxTokens
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.train.data import Example
from mlx_specstream.train.drafter_loss import UNROLLED, DrafterObjective
from mlx_specstream.train.drafters import DRAFTERS, drafter_config, train_drafter, untrained
from mlx_specstream.train.options import TrainOptions
from tests.reference import drafters as reference
from tests.support import tiny
from tests.support.drafters import random_drafter_tensors
from tests.support.engine import small_model

TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


@pytest.mark.parametrize("kind", DRAFTERS)
def test_every_level_is_what_decoding_computes_below_the_same_tokens(kind: str) -> None:
    """Teacher-forced states of all positions, against the slow reference at each of them."""
    model = small_model(vocab=12)
    backbone = Backbone(model)
    config = drafter_config(kind, backbone, 3)
    tensors = random_drafter_tensors(config)
    objective = DrafterObjective(backbone, config)
    next_log_probs = reference.of_trained(model, config, tensors)
    found = objective.levels(objective.network(tensors), objective.base(TEXT), np.arange(11))
    levels = 0
    for i, level in enumerate(found):
        assert level.positions.tolist() == list(range(len(TEXT) - 2 - i))
        logits = backbone.head(level.states[None])[0]
        log_probs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        for p, row in zip(level.positions, log_probs, strict=True):
            expected = next_log_probs(TEXT[: p + 2], TEXT[p + 2 : p + 2 + i])
            np.testing.assert_allclose(row, expected, atol=2e-3)
        levels += 1
    assert levels == {"eagle": 1, "eagle3": UNROLLED}.get(kind, 3)


def texts_of(backbone: Backbone, count: int, length: int) -> list[Example]:
    """Texts that a model says itself, from random prompts."""
    examples = []
    for seed in range(count):
        text = [int(t) for t in np.random.default_rng(seed).integers(0, 12, 4)]
        while len(text) < length:
            text.append(int(mx.argmax(backbone.model(mx.array([text]))[0, -1]).item()))
        examples.append(Example(tuple(text), 4, f"text {seed}"))
    return examples


def accepted(decoder, prompts: list[tuple[int, ...]]) -> int:
    total = 0
    for prompt in prompts:
        cache = decoder.drafter.backbone.new_cache()
        decoder.token_sampler.history[:] = prompt
        decoder.begin(prompt, cache)
        decoder.prefill(prompt[:-1], cache)
        total += sum(s.accepted for s in decoder.steps(prompt[-1], cache, MaxTokens(16)))
    return total


@pytest.mark.parametrize("kind", DRAFTERS)
def test_training_lowers_the_loss_and_raises_acceptance(kind: str, tmp_path) -> None:
    model = small_model(vocab=12, seed=2)
    backbone = Backbone(model)
    examples = texts_of(backbone, 12, 20)
    options = TrainOptions(
        iters=40, batch_size=4, learning_rate=1e-2, warmup=4, position_fraction=1.0, num_streams=2
    )
    losses = train_drafter(
        kind, backbone, options, examples, tmp_path / "out", "tiny", say=lambda _: None
    )
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    config = DecodeConfig(TreeSpec.parse("chain2"))
    start = untrained(drafter_config(kind, backbone, 2), backbone, 0)
    before = trained_drafter(backbone, drafter_config(kind, backbone, 2), start)
    after = drafter_in(tmp_path / "out", model, backbone)
    prompts = [example.tokens[:4] for example in examples]
    counts = [
        accepted(drafter_decoder(d, config, TokenSampler()), prompts) for d in (before, after)
    ]
    assert counts[1] > counts[0]


def test_a_model_without_known_layers_is_refused_in_a_sentence() -> None:
    backbone = Backbone(small_model(vocab=12))
    backbone.model.args.intermediate_size, kept = None, backbone.model.args.intermediate_size
    try:
        with pytest.raises(OptionError, match="train streams or medusa"):
            drafter_config("eagle", backbone, 3)
    finally:
        backbone.model.args.intermediate_size = kept


def test_the_verb_trains_a_drafter_that_loads(tmp_path, capsys) -> None:
    base = tiny.save_tiny_model(tmp_path / "base")
    texts = [{"prompt": f"say {n}", "completion": "na " * 8} for n in range(8)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(text) for text in texts))
    out = tmp_path / "out"
    words = ["train", "--model", str(base), "--data", str(data), "--adapter-path", str(out)]
    words += ["--drafter", "eagle3", "--iters", "3", "--batch-size", "2", "--verdict-tokens", "8"]
    assert cli.main(words) == 0
    assert f"--draft-model {out}" in capsys.readouterr().out
    model, _ = load(str(base), draft_model=out)
    assert model.drafter is not None
    assert cli.main(words) == 2  # what is there is kept
    assert "is left as it is" in capsys.readouterr().err
    assert cli.main([*words[:6], str(tmp_path / "other"), *words[7:], "--mode", "shared"]) == 2
    assert "--mode is for streams" in capsys.readouterr().err
