"""What a case consists of, drawn at random from a seed and the case's number alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_specstream.config import CacheConfig, DecodeConfig, Mode, PruneSpec, TreeSpec
from tests.support.drafters import KINDS

GROUP = 20  # cases in a row with the same model, which takes longer to make than to decode with
SHARE = 5  # cases in a row that differ in drafts alone, so that mlx-lm plays their turns once

PRECISIONS = ("float32", "4-bit", "mxfp4", "bfloat16", "float16")
TREES = ("chain", "chain1", "chain2", "1", "2", "5", "8", "13", "2^2", "3^2")
CHOICES = ("likeliest", "drawn", "filtered", "penalised", "biased")
CONTINUE = -1
BATCHES = 0.35


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation: go back to `back` tokens (`CONTINUE`: all), say, be answered.

    back: a share of the text in thousandths, or `CONTINUE`. said, answered: numbers of tokens.
    """

    back: int
    said: int
    answered: int


@dataclass(frozen=True)
class Scene:
    """What plain decoding depends on, too.

    cache: `model` (whatever kind the model has), `rotating` or `quantised`, as `cache_config` says.
    choice: how tokens are drawn. chunk: prompt tokens per pass. seed: of prompts and drawn tokens.
    slack, drop: how many rows out of sight stay, and are dropped at a time, where layers rotate.
    mode: of the streams.
    """

    family: str
    model_seed: int
    precision: str
    cache: str
    cache_config: CacheConfig
    choice: str
    chunk: int
    turns: tuple[Turn, ...]
    seed: int
    slack: int
    drop: int
    mode: Mode = "lossless"


@dataclass(frozen=True)
class Case:
    """A scene, and how it is speculated on.

    drafts: `streams` (random), `table` (often right), or `none`: no drafter but look-up, which
    `decode.drafts` may add to either; `auto` lets a random governor and look-up's planner choose. Or
    a kind of another drafter, with random weights. beside: how many other requests share the passes
    of a batch, -1 for a request that is decoded alone.
    """

    number: int
    scene: Scene
    decode: DecodeConfig
    drafts: str
    beside: int = -1


def draw_case(
    seed: int,
    number: int,
    families: Sequence[str],
    mode: Mode = "lossless",
    batches: float = BATCHES,
) -> Case:
    """Return case `number` of the run with this seed; in shared mode main sees its streams.

    batches: the share of cases that are played in batches, of those that can be.
    """
    group = np.random.default_rng([seed, 1, number // GROUP])
    family = str(group.choice(list(families)))
    model_seed = int(group.integers(0, 3))
    precision = str(group.choice(PRECISIONS, p=[0.6, 0.12, 0.08, 0.1, 0.1]))
    shared = np.random.default_rng([seed, 2, number // SHARE])
    cache = str(shared.choice(["model", "rotating", "quantised"], p=[0.4, 0.35, 0.25]))
    scene = Scene(
        family=family,
        model_seed=model_seed,
        precision=precision,
        cache=cache,
        cache_config=_cache_config(cache, shared),
        choice=str(shared.choice(CHOICES, p=[0.5, 0.2, 0.1, 0.1, 0.1])),
        chunk=int(shared.choice([1, 3, 8, 17, 64])),
        turns=_turns(shared),
        seed=int(shared.integers(0, 2**31)),
        slack=int(shared.choice([32, 64])),  # more than the drafts of any path
        drop=int(shared.choice([0, 7, 256])),
        mode=mode,
    )
    own = np.random.default_rng([seed, 3, number])
    decode, drafts = _decode_config(own), str(own.choice(["streams", "table"]))
    lookups = np.random.default_rng([seed, 4, number])
    if mode == "shared":
        decode = replace(decode, schedule="inline", stream_nodes=0)
    elif lookups.random() < 0.3:
        drafts = str(lookups.choice(["none", "auto"]))
    if drafts == "none" or lookups.random() < 0.5:
        names = ("lookup",) if drafts == "none" else ("streams", "lookup")
        decode = replace(decode, drafts=names)
    others = np.random.default_rng([seed, 5, number])
    if mode == "lossless" and drafts in ("streams", "table") and others.random() < 0.3:
        drafts = str(others.choice(KINDS))
    company, beside = np.random.default_rng([seed, 6, number]), -1
    if drafts not in KINDS and cache == "model" and company.random() < batches:
        beside = int(company.integers(0, 4))
    return Case(number, scene, decode, drafts, beside)


def _cache_config(cache: str, draw: np.random.Generator) -> CacheConfig:
    if cache == "rotating":
        return CacheConfig(max_kv_size=int(draw.integers(5, 24)))
    if cache == "quantised":
        bits, start = int(draw.choice([4, 8])), int(draw.integers(0, 40))
        return CacheConfig(kv_bits=bits, kv_group_size=32, quantized_kv_start=start)
    return CacheConfig()


def _decode_config(draw: np.random.Generator) -> DecodeConfig:
    prune = None
    if draw.random() < 0.3:
        prune = PruneSpec(int(draw.integers(1, 8)), float(draw.choice([0.0, 0.02, 0.2])))
    inline = draw.random() < 0.5
    return DecodeConfig(
        tree=TreeSpec.parse(str(draw.choice(TREES))),
        prune=prune,
        schedule="inline" if inline else "deferred",
        stream_nodes=int(draw.choice([0, 1, 3])) if inline else 0,
        use_conditioner=bool(draw.random() < 0.7),
    )


def _turns(draw: np.random.Generator) -> tuple[Turn, ...]:
    turns = []
    for number in range(int(draw.choice([1, 2, 3], p=[0.5, 0.3, 0.2]))):
        back = CONTINUE if number == 0 or draw.random() < 0.5 else int(draw.integers(0, 1000))
        turns.append(Turn(back, int(draw.integers(1, 30)), int(draw.integers(1, 16))))
    return tuple(turns)
