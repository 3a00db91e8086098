"""Small checkpoints as people have them, each written by its real writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from mlx_specstream.config import StreamConfig  # noqa: E402
from mlx_specstream.convert.pytorch.adapters import StreamAdapters  # noqa: E402
from mlx_specstream.convert.pytorch.backbone import TorchBackbone  # noqa: E402
from mlx_specstream.convert.pytorch.checkpoint import checkpoint_name, save_checkpoint  # noqa: E402

QKV = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def hf_model(family: str = "llama", seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """Return a random float32 transformers model: 3 layers, width 64, 97 tokens."""
    fields: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rope_theta": 50000.0,
    }
    if family == "phi3":
        fields["original_max_position_embeddings"] = 256
    config = AutoConfig.for_model(family, **{**fields, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            scale = 1.0 if "embed" in name else 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(1 + 0.2 * noise if "norm" in name else noise * scale)
    return model


def save_base(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """Write a model with transformers' own `save_pretrained`."""
    hf_model(family, **overrides).save_pretrained(folder)
    return folder


def stream_config(**changes: Any) -> StreamConfig:
    """Return a config that uses every part."""
    fields: dict[str, Any] = {
        "num_streams": 3,
        "num_msa_layers": 2,
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "target_modules": QKV,
        "stream_init_rank": 2,
        "pruner_rank": 2,
        "conditioner_rank": 4,
        "conditioner_hidden": 8,
    }
    return StreamConfig(**{**fields, **changes})


def random_adapters(base: Path, config: StreamConfig, seed: int = 1) -> StreamAdapters:
    """Return adapters of the PyTorch reference with nothing left at zero."""
    torch.manual_seed(seed)
    adapters = StreamAdapters(config, TorchBackbone.load(base))
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return adapters


def save_streams(
    folder: Path, base: Path, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Write a schema-1 folder with the PyTorch reference's own writer."""
    adapters = random_adapters(base, stream_config(**changes))
    save_checkpoint(folder, adapters, str(base), dtype)
    return folder


def stream_state(adapters: StreamAdapters) -> dict[str, torch.Tensor]:
    """Return the reference's tensors under their names on disk."""
    return {checkpoint_name(name): value.detach() for name, value in adapters.named_parameters()}


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    fields = json.loads(path.read_text())
    fields.update(changes)
    path.write_text(
        json.dumps({name: value for name, value in fields.items() if value is not None})
    )
