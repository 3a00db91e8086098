"""The model card of a converted folder: where it comes from, what is in it, how to use it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from .. import __version__
from ..errors import printable
from ..weights.tensorfile import FLOATS
from .plan import ConversionPlan


def model_card(plan: ConversionPlan, name: str, figures: Mapping[str, str]) -> str:
    """Return the text of README.md: front matter for the hub, provenance, figures, usage."""
    return "\n".join(
        [
            *_front_matter(plan),
            f"# {name}",
            "",
            *_provenance(plan),
            "",
            *_streams(plan),
            *_drafter(plan),
            *_table("What `specstream convert --check` measured", figures),
            *_usage(plan, name),
        ]
    )


def _front_matter(plan: ConversionPlan) -> list[str]:
    lines = ["---", "library_name: mlx", "pipeline_tag: text-generation", "tags:", "- mlx"]
    if plan.streams:
        lines.append("- speculative-streaming")
    if plan.drafter:
        lines.append(f"- {plan.drafter.config.kind}")
    if plan.base_name:
        lines.append(f"base_model: {json.dumps(plan.base_name)}")
    return [*lines, "---", ""]


def _provenance(plan: ConversionPlan) -> list[str]:
    tools = [f"mlx-specstream {__version__}", *(_tool(name) for name in ("mlx-lm", "mlx"))]
    lines = [f"Converted from `{printable(plan.path.name)}` by {', '.join(tools)}."]
    if plan.base is not None and plan.writes_base:
        kinds = sorted({spec.dtype for tensor in plan.base.tensors for spec in tensor.outputs})
        size = sum(spec.nbytes for tensor in plan.base.tensors for spec in tensor.outputs)
        lines.append(f"Base weights: {size / 1e6:,.1f} MB ({', '.join(kinds)}).")
        quantisation = plan.base.config.get("quantization")
        if isinstance(quantisation, dict):
            bits, group = quantisation.get("bits"), quantisation.get("group_size")
            mode = quantisation.get("mode", "affine")
            lines.append(f"Quantised to {bits} bits in groups of {group} ({mode}).")
    elif plan.base_name:
        what = "A drafter's" if plan.drafter else "Stream"
        lines.append(f"{what} weights alone; they belong to the base model `{plan.base_name}`.")
    return lines


def _streams(plan: ConversionPlan) -> list[str]:
    if plan.streams is None:
        return []
    config = plan.streams.config
    specs = plan.streams.tensors
    count = sum(math.prod(spec.shape) for spec in specs if spec.dtype in FLOATS)
    rows = {
        "mode": config.mode,
        "streams (γ)": str(config.num_streams),
        "multi-stream layers": str(config.num_msa_layers),
        "LoRA rank, alpha": f"{config.lora_rank}, {config.lora_alpha:g}",
        "adapted modules": ", ".join(config.target_modules) or "none",
        "conditioned candidates": "yes" if config.conditioner_rank else "no",
        "tokens that condition": str(config.conditioner_tokens if config.conditioner_rank else 0),
        "rank of the next token": str(config.next_token_rank),
        "pruner rank": str(config.pruner_rank),
        "parameters": f"{count:,} ({', '.join(sorted({spec.dtype for spec in specs}))})",
    }
    return _table("Streams", rows)


def _drafter(plan: ConversionPlan) -> list[str]:
    if plan.drafter is None:
        return []
    specs = plan.drafter.tensors
    count = sum(math.prod(spec.shape) for spec in specs if spec.dtype in FLOATS)
    kinds = ", ".join(sorted({spec.dtype for spec in specs if spec.dtype in FLOATS}))
    config = plan.drafter.config
    rows = {"kind": config.kind, "parameters": f"{count:,} ({kinds})"}
    if config.num_heads:
        rows["heads"] = str(config.num_heads)
    return _table("Drafter", rows)


def _table(title: str, rows: Mapping[str, str]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *lines, ""]


def _usage(plan: ConversionPlan, name: str) -> list[str]:
    if plan.drafter is not None:
        base = plan.base_name or "BASE"
        command = f"specstream generate --model {base} --draft-model {name} --prompt hello"
        return ["## Use", "", "```bash", "pip install mlx-specstream", command, "```", ""]
    if plan.streams is None:
        return [
            "## Use",
            "",
            "```bash",
            f"mlx_lm.generate --model {name} --prompt hello",
            "```",
            "",
        ]
    text = (
        "It is also a plain mlx-lm model: mlx-lm ignores the streams." if plan.writes_base else ""
    )
    return ["## Use", "", "```bash", "pip install mlx-specstream", "```", "", text, ""]


def _tool(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return name
