"""The card of adopted streams: what they belong to, what they are, what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ... import __version__
from ...errors import printable
from ...weights.checkpoint import StreamWeights

CARD_FILE = "README.md"
TAG = "speculative-streaming"
"""By which the hub finds streams."""
CHAIN_KEY = "tokens_per_pass_chain"
"""In the metadata of a streams config: what was measured, for those who look for streams."""


def adoption_card(weights: StreamWeights, name: str, figures: Mapping[str, Any]) -> str:
    """Return README.md for the hub and for people; it names no path of this machine."""
    base = weights.base.name if weights.base else None
    config = weights.config
    parameters = sum(math.prod(tensor.shape) for tensor in weights.tensors.values())
    per_pass, verified = figures.get("tokens_per_pass", {}), figures.get("verified", {})
    bench = figures.get("bench", {})
    exact = (
        "the text cannot change" if config.mode == "lossless" else "a fine-tune: the text changes"
    )
    shape = {
        "mode": f"{config.mode}, {exact}",
        "streams γ, MSA layers": f"{config.num_streams}, the upper {config.num_msa_layers}",
        "adapters": f"LoRA rank {config.lora_rank} on {', '.join(config.target_modules) or 'nothing'}",
        "conditioned candidates": f"over the last {config.conditioner_tokens} tokens"
        if config.conditioner_rank
        else "no",
        "know the next token": "yes" if config.next_token_rank else "no",
        "early-exit pruner": f"rank {config.pruner_rank}" if config.pruner_rank else "no",
        "parameters": f"{parameters:,}",
    }
    if figures.get("texts"):
        shape["trained on"] = (
            f"{figures['texts']:,} answers, {figures['updates']:,} updates, "
            f"{figures['train_minutes']:.1f} minutes"
        )
    measured = {
        f"tokens per pass, {tree}": f"{value:.2f}, on held-out prompts, greedy"
        for tree, value in per_pass.items()
    }
    if verified:
        measured["answers compared with plain decoding"] = (
            f"{verified['answers']}: {verified['identical']} identical, "
            f"{verified['near-tie']} part at a near-tie"
        )
    if bench:
        measured["speed with --tree auto"] = (
            f"{bench['speedup']:.2f}x mlx-lm, {bench['tokens_s']:.1f} tokens a second, on "
            f"{bench['machine']}, {bench['prompts']} prompts"
        )
    if before := figures.get("chain_before"):
        measured["the streams before, as a chain"] = f"{before:.2f} tokens per pass"
    return "\n".join(
        [
            "---",
            "library_name: mlx",
            "pipeline_tag: text-generation",
            "tags:",
            "- mlx",
            f"- {TAG}",
            # The hub takes ids alone, not the name of a folder here.
            *([f"base_model: {json.dumps(base)}"] if base and "/" in base else []),
            "---",
            "",
            f"# {printable(name)}",
            "",
            f"Speculative streams for `{printable(base or 'a model')}`, made with "
            f"mlx-specstream {__version__}. They belong to that base alone and hold none of it.",
            "",
            *_table("Streams", shape),
            *(_table("Measured", measured) if measured else []),
            "## Use",
            "",
            "```sh",
            "pip install mlx-specstream",
            f"specstream generate --model {printable(base or 'MODEL')} --streams THIS --prompt ...",
            "```",
            "",
        ]
    )


def _table(title: str, rows: Mapping[str, str]) -> list[str]:
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *lines, ""]
