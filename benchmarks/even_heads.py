"""The demo model with an even number of heads, which two processes can divide: the same function.

It has 9 query heads on 3 of keys and values. Here a group of heads is added whose weights are zero:
its values are zero, and so is what it adds to any hidden state. Streams' adapters grow alike.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx

from mlx_specstream.loading.demo import resolve_demo
from mlx_specstream.loading.load import load
from mlx_specstream.planner import ACCEPTANCE_FILE
from mlx_specstream.weights.checkpoint import load_streams, save_streams
from mlx_specstream.weights.fingerprint import fingerprint
from mlx_specstream.weights.shipped import SHIPPED

OUTPUTS = ("q_proj", "k_proj", "v_proj")  # whose outputs are heads; o_proj's inputs are


def make_even(
    folder: Path, base: Path | None = None, streams: Path = SHIPPED / "demo-chat"
) -> tuple[Path, Path]:
    """Write a llama (None: the demo model) with one group of heads more, and its streams.

    Returns both folders.
    """
    base, made, joined = base or resolve_demo(), folder / "model", folder / "streams"
    config = json.loads((base / "config.json").read_text("utf-8"))
    groups, heads = config["num_key_value_heads"], config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    more = {"q_proj": heads // groups * width, "k_proj": width, "v_proj": width}
    more["o_proj"] = more["q_proj"]
    config |= {
        "num_key_value_heads": groups + 1,
        "num_attention_heads": heads + heads // groups,
        "head_dim": width,
    }
    made.mkdir(parents=True, exist_ok=True)
    for path in base.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            shutil.copy(path, made)
    (made / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    weights = {}
    for file in sorted(base.glob("model*.safetensors")):
        held = mx.load(str(file))
        assert isinstance(held, dict)
        for name, value in held.items():
            *_, module, leaf = name.split(".") if "." in name else ("", name, "")
            if module in more and leaf in ("weight", "bias"):
                value = _with_zeros(value, more[module], 1 if module == "o_proj" else 0)
            weights[name] = value
    mx.save_safetensors(str(made / "model.safetensors"), weights, metadata={"format": "mlx"})

    found = load_streams(streams)
    tensors = {}
    for name, value in found.tensors.items():
        *_, module, leaf = name.split(".") if "." in name else ("", name, "")
        if module in OUTPUTS and leaf == "lora_b":
            value = _with_zeros(value, more[module], 1)
        elif module == "o_proj" and leaf == "lora_a":
            value = _with_zeros(value, more[module], 0)
        tensors[name] = value
    model, _ = load(str(made), streams=None, lazy=True)
    own = fingerprint(model.model)
    save_streams(joined, found.config, tensors, base_model=None, fingerprint=own)
    if (recorded := streams / ACCEPTANCE_FILE).exists():
        shutil.copy(recorded, joined)
    return made, joined


def _with_zeros(value: mx.array, number: int, axis: int) -> mx.array:
    """Return `value` with so many rows or columns of zeros behind it."""
    padding = [(0, number if place == axis else 0) for place in range(value.ndim)]
    return mx.pad(value, padding)
