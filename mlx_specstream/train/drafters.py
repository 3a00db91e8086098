"""Training a drafter that is not streams: the same texts, batches, optimiser and budget as streams.

    texts ──► batches ──► the base, once ──► levels of the drafter ──► loss ──► adapter folder

The LM head is the base's. A run is short and begins anew when it is stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ..config import DecodeConfig, DrafterConfig, LayerConfig, TreeSpec
from ..errors import OptionError
from ..loading.drafter import drafter_in
from ..loading.load import StreamModel
from ..model.backbone import Backbone
from ..speculation.decode import decode
from ..speculation.drafting import drafter_decoder
from ..speculation.result import MaxTokens
from ..speculation.sampling import TokenSampler
from ..weights.drafter import drafter_shapes, save_drafter
from ..weights.fingerprint import fingerprint
from .batches import BatchPlan, Selection
from .data import Example
from .drafter_loss import DrafterObjective
from .head import Head
from .loss import Tensors
from .optimizer import StreamOptimizer
from .options import TrainOptions
from .trainer import DivergenceError
from .vocabulary import VocabularySampler

DRAFTERS = ("medusa", "hydra", "hydra++", "eagle", "eagle3")
_ZERO_AT_START = ("o_proj.weight", "down_proj.weight", ".bias")


def drafter_config(kind: str, backbone: Backbone, num_heads: int) -> DrafterConfig:
    """Return what is trained: published shapes, sharing the base's LM head.

    Raises:
        OptionError: the model's config does not say how its layers look.
    """
    h, V, N = backbone.hidden_size, backbone.vocab_size, backbone.num_layers
    name: Any = kind.removesuffix("++")
    sizes: dict[str, Any] = {}
    if kind in ("medusa", "hydra", "hydra++"):
        sizes = {"num_heads": num_heads, "num_blocks": 4 if kind == "hydra++" else 1}
    if kind in ("hydra++", "eagle", "eagle3"):
        sizes["layer"] = _layer_like(backbone)
    if kind == "eagle3":
        features = (min(2, N - 1), N // 2, max(N - 3, 0))
        sizes |= {"draft_vocab_size": V, "feature_layers": features}
    return DrafterConfig(name, h, V, bias=kind == "eagle", **sizes)


def _layer_like(backbone: Backbone) -> LayerConfig:
    """Return the sizes of the base's own layers for a drafter's."""
    arguments = getattr(backbone.model, "args", None)
    heads = getattr(arguments, "num_attention_heads", None)
    width = getattr(arguments, "intermediate_size", None)
    if not isinstance(heads, int) or not isinstance(width, int):
        raise OptionError(
            f"a {backbone.family} model does not say how many heads and what MLP its layers have, so "
            "no such layer can be trained for it; train streams or medusa."
        )
    h = backbone.hidden_size
    return LayerConfig(
        hidden_size=h,
        intermediate_size=width,
        num_attention_heads=heads,
        num_key_value_heads=getattr(arguments, "num_key_value_heads", None) or heads,
        head_dim=getattr(arguments, "head_dim", None) or h // heads,
        rms_norm_eps=getattr(arguments, "rms_norm_eps", 1e-6),
        rope_theta=float(getattr(arguments, "rope_theta", 10000.0)),
        rope_scaling=getattr(arguments, "rope_scaling", None),
        max_position_embeddings=getattr(arguments, "max_position_embeddings", None) or 2048,
    )


def untrained(config: DrafterConfig, backbone: Backbone, seed: int) -> Tensors:
    """Return weights to start from: what goes on as it came, and adds nothing yet.

    Blocks start at zero, residuals and `fc` as the identity on the (last) state, norms as the
    base's final norm where they stand in its place.
    """
    h = config.hidden_size
    keys = iter(mx.random.split(mx.random.key(seed), 1000))
    final_norm = backbone.norm(mx.ones((1, 1, h), dtype=backbone.dtype))[0, 0].astype(mx.float32)
    tensors: Tensors = {}
    for name, shape in sorted(drafter_shapes(config).items()):
        value = mx.zeros(shape)
        if name == "norm.weight":
            value = final_norm
        elif "norm" in name:
            value = mx.ones(shape)
        elif name == "fc.weight" or name.endswith("residual.weight"):
            place = 0 if config.kind == "hydra" else shape[1] - h
            value[:, place : place + h] = mx.eye(h)
        elif ".blocks." not in name and not name.endswith(_ZERO_AT_START):
            value = mx.random.normal(shape, key=next(keys)) / math.sqrt(shape[1])
        tensors[name] = value
    return tensors


def train_drafter(
    kind: str,
    backbone: Backbone,
    options: TrainOptions,
    train: Sequence[Example],
    folder: Path,
    base_name: str | None,
    *,
    sampled_vocab: int = 0,
    say: Callable[[str], None] = print,
) -> list[float]:
    """Train a drafter on texts and write its folder; return the loss of every update.

    sampled_vocab: tokens the head computes in a step, 0 for all.

    Raises:
        DivergenceError: the loss became NaN or infinite; nothing is written.
        OptionError: as `drafter_config`.
    """
    config = drafter_config(kind, backbone, options.num_streams)
    objective = DrafterObjective(backbone, config, options.alpha_decay)
    tensors = untrained(config, backbone, options.seed)
    plan = BatchPlan(train, options.batch_size, options.position_fraction, options.seed)
    texts = (example.tokens[example.prompt_length :] for example in train)
    sampler = VocabularySampler.of_size(backbone.vocab_size, texts, sampled_vocab)
    rates = {"embeddings": options.learning_rate, "adapters": options.learning_rate}
    optimizer = StreamOptimizer(tensors, rates, options)
    say(f"{len(train)} texts, {sum(t.size for t in tensors.values()):,} parameters ({kind}).")
    losses: list[float] = []
    with tqdm(total=options.num_updates, desc="train", disable=None) as bar:
        for update in range(options.num_updates):
            first = update * options.grad_accumulation_steps
            total, gradients = 0.0, Tensors()
            for number in range(first, first + options.grad_accumulation_steps):
                loss, part = _gradients(objective, sampler, tensors, plan.batch(number), number)
                total += loss
                gradients = {name: g + gradients.get(name, 0.0) for name, g in part.items()}
                mx.eval(gradients)
            tensors, _, finite = optimizer.update(tensors, gradients, update)
            if not finite or not math.isfinite(total):
                raise DivergenceError(
                    f"the loss became NaN or infinite in update {update + 1}; nothing was written: "
                    "start again with a lower --learning-rate."
                )
            losses.append(total)
            bar.update()
            bar.set_postfix(loss=f"{total:.3f}")
    save_drafter(
        folder,
        config,
        {name: tensor.astype(mx.float16) for name, tensor in tensors.items()},
        base_model=base_name,
        fingerprint=fingerprint(backbone.model),
        metadata={"trained_by": "specstream train", "updates": str(len(losses))},
    )
    return losses


def tokens_per_pass(
    model: StreamModel, folder: Path, texts: Sequence[Example], max_tokens: int
) -> float:
    """Return the tokens per pass of chains on the texts' prompts, 1.0 without any."""
    drafter = drafter_in(folder, model.model, model.backbone)
    config = DecodeConfig(TreeSpec.parse("chain"))
    tokens = passes = 0
    for text in texts:
        decoder = drafter_decoder(drafter, config, TokenSampler(history=list(text.prompt)))
        steps = decode(decoder, text.prompt, model.backbone.new_cache(), MaxTokens(max_tokens))
        for step in steps:
            tokens, passes = tokens + len(step.tokens), passes + 1
    return tokens / passes if passes else 1.0


def _gradients(
    objective: DrafterObjective,
    sampler: VocabularySampler,
    tensors: Tensors,
    batch: Sequence[Selection],
    number: int,
) -> tuple[float, Tensors]:
    """Return a batch's loss and its gradient."""
    tokens = np.concatenate([s.example.tokens[s.example.prompt_length :] for s in batch])
    head = Head.of(objective.backbone, sampler.draw(tokens, (0, number)))
    bases = [objective.base(s.example.tokens) for s in batch]

    def loss(tensors: Tensors) -> tuple[mx.array, list[mx.array]]:
        return objective.loss(tensors, batch, bases, head)

    (total, _), gradients = mx.value_and_grad(loss)(tensors)
    mx.eval(total, gradients)
    return float(np.array(total)), gradients
