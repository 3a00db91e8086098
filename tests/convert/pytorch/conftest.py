"""Tiny random Hugging Face models of every supported family, float32, and streams for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mlx_specstream.config import StreamConfig  # noqa: E402
from mlx_specstream.convert.pytorch.adapters import StreamAdapters  # noqa: E402
from mlx_specstream.convert.pytorch.backbone import SUPPORTED_FAMILIES, TorchBackbone  # noqa: E402
from mlx_specstream.train.data import Example  # noqa: E402

VOCAB = 97


def tiny_config(family: str) -> object:
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "mistral":
        shape["sliding_window"] = 6
    if family in ("qwen2", "phi3"):
        shape.pop("head_dim")
    return transformers.AutoConfig.for_model(family, **shape)


def tiny_backbone(family: str = "llama", seed: int = 0) -> TorchBackbone:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return TorchBackbone(model.eval().requires_grad_(False))


def tiny_adapters(backbone: TorchBackbone, seed: int = 1, **changes: object) -> StreamAdapters:
    torch.manual_seed(seed)
    fields = {
        "num_streams": 3,
        "num_msa_layers": 2,
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "target_modules": tuple(backbone.layers[0].linear_modules()),
        **changes,
    }
    adapters = StreamAdapters(StreamConfig(**fields), backbone)
    for parameter in adapters.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return adapters


def example_of(key: tuple[str, int], prompt: tuple[int, ...], answer: tuple[int, ...]) -> Example:
    return Example((*prompt, *answer), len(prompt), key=key)


@pytest.fixture(params=SUPPORTED_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_backbone() -> Callable[..., TorchBackbone]:
    return tiny_backbone


@pytest.fixture
def make_adapters() -> Callable[..., StreamAdapters]:
    return tiny_adapters
