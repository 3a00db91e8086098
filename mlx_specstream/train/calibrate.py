"""The pruning threshold that keeps what would be accepted [SS §3.1.3, own rule for the value].

Held-out prompts are decoded with nothing pruned while the early exit's probabilities are noted.
An accepted node survives a threshold if it and all nodes above it have at least that probability;
the threshold is the highest under which the wanted share of accepted nodes survives.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from ..config import DecodeConfig, PruneSpec, StreamConfig, TreeSpec
from ..model.backbone import Backbone
from ..model.cache import KVCache
from ..speculation.drafters import StreamDrafter
from ..speculation.drafting import StreamDecoder
from ..speculation.prune import Pruner
from ..speculation.result import MaxTokens
from ..speculation.sampling import TokenSampler
from ..speculation.streams import Streams
from ..speculation.tree import DraftTree
from .loss import Tensors
from .task import Task

KEPT_SHARE = 0.99
ROWS = 16


@dataclass(frozen=True)
class NotingPruner(Pruner):
    """A pruner that remembers what it said of every tree."""

    said: list[mx.array] = field(default_factory=list)

    def child_log_probs(self, backbone: Backbone, tree: DraftTree, main: mx.array) -> mx.array:
        scores = super().child_log_probs(backbone, tree, main)
        self.said.append(scores)
        return scores


def accepted_scores(
    backbone: Backbone,
    config: StreamConfig,
    tensors: Tensors,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop: Collection[int],
) -> list[float]:
    """Return, for each accepted node of decoding, its path's lowest early-exit log-probability."""
    streams = Streams(backbone, config, tensors)
    found: list[float] = []
    for prompt in prompts:
        plan = DecodeConfig(tree=TreeSpec("best", rows=ROWS), prune=PruneSpec(keep=ROWS))
        decoder = StreamDecoder(streams, plan, TokenSampler(), keep_drafts=True)
        pruner = NotingPruner(tensors["pruner.lora_a"], tensors["pruner.lora_b"])
        assert isinstance(decoder.drafter, StreamDrafter)
        drafter = replace(decoder.drafter, pruner=pruner)
        decoder.stepper = replace(decoder.stepper, drafter=drafter)
        cache = KVCache(backbone.num_layers)
        decoder.prefill(prompt[:-1], cache)

        asked = 0
        for result in decoder.steps(prompt[-1], cache, MaxTokens(max_tokens, stop)):
            if not result.drafted:
                continue  # a bare root is not scored
            scores = np.array(pruner.said[asked])
            asked += 1
            assert result.draft is not None
            path = result.draft.accepted[1:]
            found += np.minimum.accumulate(scores[path]).tolist() if path else []
    return found


def threshold_of(scores: Sequence[float], share: float = KEPT_SHARE) -> tuple[float, float]:
    """Return the highest threshold that keeps `share` of the nodes, and what it does keep.

    Rounded down to three digits, so that it can be typed.
    """
    if not scores:
        return 0.0, 1.0
    lost = int((1 - share) * len(scores))
    value = math.exp(sorted(scores)[lost])
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    value = math.floor(value * 10**digits) / 10**digits if value > 0 else 0.0
    kept = sum(math.exp(score) >= value for score in scores) / len(scores)
    return value, kept


def calibration(task: Task, tensors: Tensors) -> dict[str, str]:
    """Return the pruner's threshold for the adapter's metadata, if there is a pruner."""
    options = task.options
    prompts = task.prompts[: options.verdict_prompts]
    if not task.config.pruner_rank or not prompts:
        return {}
    limits = (prompts, options.verdict_tokens, task.stop)
    scores = accepted_scores(task.backbone, task.config, tensors, *limits)
    threshold, kept = threshold_of(scores)
    task.say(f"Pruning below {threshold:g} keeps {kept:.1%} of {len(scores)} accepted nodes.")
    return {"prune_threshold": f"{threshold:g}", "prune_kept": f"{kept:.4f}"}
