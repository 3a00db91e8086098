"""What drafters propose, computed slowly: the whole text anew for every draft, no cache, in NumPy.

Written from the papers: rows are read in order, each attends to those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_specstream.config import DrafterConfig, LayerConfig

Tensors = Mapping[str, np.ndarray]
# (text whose last token no pass has read yet, drafts below it) -> log-probabilities (V,)
NextLogProbs = Callable[[Sequence[int], Sequence[int]], np.ndarray]


def of_trained(
    model: nn.Module, config: DrafterConfig, weights: Mapping[str, mx.array]
) -> NextLogProbs:
    """Return what a trained drafter's next token is after a text and drafts."""
    tensors = {name: np.array(value) for name, value in weights.items()}
    return lambda text, drafts: _log_softmax(_logits(model, config, tensors, text, drafts))


def of_model(draft: nn.Module) -> NextLogProbs:
    """Return what a draft model's next token is after a text and drafts, by mlx-lm."""
    return lambda text, drafts: _log_softmax(np.array(draft(mx.array([[*text, *drafts]]))[0, -1]))


def _logits(
    model: nn.Module,
    config: DrafterConfig,
    tensors: Tensors,
    text: Sequence[int],
    drafts: Sequence[int],
) -> np.ndarray:
    states, inputs = _base(model, text[:-1])
    level = len(drafts)
    if config.kind == "medusa":
        x = _blocks(tensors, config, level, states[-1])
        return _lm_head(model, tensors, f"heads.{level}.head", x)
    embeddings = np.array(model.model.embed_tokens(mx.array([*text, *drafts])))
    if config.kind == "hydra":
        state = states[-1]
        if config.layer is not None:
            rows = _norm(states, tensors["prefix.input_layernorm.weight"], config.layer)
            after = _layer(tensors, "prefix", config.layer, states, rows)
            state = _norm(after, tensors["norm.weight"], config.layer)[-1]
        x = np.concatenate([state, *embeddings[len(text) - 1 : len(text) + level]])
        first = _silu(_linear(tensors, f"heads.{level}.blocks.0", x))
        x = _linear(tensors, f"heads.{level}.residual", x) + first
        x = _blocks(tensors, config, level, x, start=1)
        return _lm_head(model, tensors, f"heads.{level}.head", x)
    assert config.layer is not None
    if config.own_embedding:
        embeddings = tensors["embed_tokens.weight"][[*text, *drafts]]
    if config.kind == "eagle":
        features = states
    else:
        chosen = [inputs[number] for number in config.feature_layers]
        features = _linear(tensors, "fc", np.concatenate(chosen, axis=-1))
    for _ in range(level + 1):
        rows = embeddings[1 : len(features) + 1]  # each beside the features of the token before
        if config.kind == "eagle":
            joined = _linear(tensors, "fc", np.concatenate([rows, features], axis=-1))
            out = _layer(tensors, "layer", config.layer, joined, joined)
        else:
            both = [
                _norm(rows, tensors["layer.input_layernorm.weight"], config.layer),
                _norm(features, tensors["layer.hidden_norm.weight"], config.layer),
            ]
            out = _layer(tensors, "layer", config.layer, features, np.concatenate(both, axis=-1))
        features = np.concatenate([features, out[-1:]])
    if config.kind == "eagle":
        return _lm_head(model, tensors, "head", out[-1])
    drafted = _lm_head(model, tensors, "head", _norm(out[-1], tensors["norm.weight"], config.layer))
    if "d2t" not in tensors:
        return drafted
    logits = np.full(config.vocab_size, -np.inf)
    logits[tensors["d2t"]] = drafted
    return logits


def _base(model: nn.Module, text: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return mlx-lm's states after the final norm, and what goes into each layer."""
    hidden = model.model.embed_tokens(mx.array([list(text)]))
    inputs = []
    for layer in model.model.layers:
        inputs.append(np.array(hidden[0]))
        hidden = layer(hidden, "causal" if len(text) > 1 else None, None)
    return np.array(model.model.norm(hidden)[0]), inputs


def _layer(
    tensors: Tensors, name: str, config: LayerConfig, residual: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    n, H, K, D = (
        len(rows), config.num_attention_heads, config.num_key_value_heads, config.head_dim,
    )  # fmt: skip
    attention = f"{name}.self_attn"
    split = lambda x, heads: x.reshape(n, heads, D).transpose(1, 0, 2)  # noqa: E731
    q = _rope(split(_linear(tensors, f"{attention}.q_proj", rows), H), config.rope_theta)
    k = _rope(split(_linear(tensors, f"{attention}.k_proj", rows), K), config.rope_theta)
    v = split(_linear(tensors, f"{attention}.v_proj", rows), K)
    k, v = np.repeat(k, H // K, axis=0), np.repeat(v, H // K, axis=0)
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(D)
    scores = np.where(np.tril(np.ones((n, n), dtype=bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = (weights @ v).transpose(1, 0, 2).reshape(n, H * D)
    hidden = residual + _linear(tensors, f"{attention}.o_proj", out)
    x = _norm(hidden, tensors[f"{name}.post_attention_layernorm.weight"], config)
    gate = _silu(_linear(tensors, f"{name}.mlp.gate_proj", x))
    up = _linear(tensors, f"{name}.mlp.up_proj", x)
    return hidden + _linear(tensors, f"{name}.mlp.down_proj", gate * up)


def _rope(x: np.ndarray, theta: float) -> np.ndarray:
    """Rotate (heads, n, D) by position, halves of the channels against each other."""
    D = x.shape[-1]
    angles = np.arange(x.shape[1])[:, None] / theta ** (np.arange(0, D, 2) / D)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def _blocks(
    tensors: Tensors, config: DrafterConfig, head: int, x: np.ndarray, start: int = 0
) -> np.ndarray:
    for block in range(start, config.num_blocks):
        x = x + _silu(_linear(tensors, f"heads.{head}.blocks.{block}", x))
    return x


def _lm_head(model: nn.Module, tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    if f"{name}.weight" in tensors:
        return _linear(tensors, name, x)
    tied = "lm_head" not in model
    weight = model.model.embed_tokens.weight if tied else model.lm_head.weight
    return np.array(weight) @ x


def _linear(tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    out = x @ tensors[f"{name}.weight"].T
    return out + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else out


def _norm(x: np.ndarray, weight: np.ndarray, config: LayerConfig) -> np.ndarray:
    mean = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean + config.rms_norm_eps) * weight


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
