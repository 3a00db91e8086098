"""Decoding a shared-mode model many prompts at once says what the one-mask reference says."""

from __future__ import annotations

import functools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mlx_specstream.convert.pytorch.batched import PromptInSlot, answer  # noqa: E402
from mlx_specstream.convert.pytorch.model import SpeculativeModel  # noqa: E402
from mlx_specstream.convert.pytorch.shared_decoding import SharedDecoder, merge_lora  # noqa: E402
from tests.convert.pytorch.conftest import tiny_adapters, tiny_backbone  # noqa: E402


def greedy_reference(model: SpeculativeModel, prompt: list[int], count: int) -> list[int]:
    ids, first = list(prompt), len(prompt) - 1
    for _ in range(count):
        out = model.forward(torch.tensor([ids]), torch.arange(first, len(ids)))
        ids.append(int(model.backbone.head(out.main[0, -1]).argmax()))
        if ids[-1] == 2:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_answers_are_the_reference_s(family):
    backbone = tiny_backbone(family)
    adapters = tiny_adapters(backbone, mode="shared", value_rotation=0.05).requires_grad_(False)
    texts = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14], [15, 16, 17, 18]]
    model = SpeculativeModel(backbone, adapters)
    wanted = [greedy_reference(model, text, 8) for text in texts]
    merge_lora(backbone, adapters)
    prompts = [PromptInSlot(i, [], None, text, "t") for i, text in enumerate(texts)]
    make = functools.partial(SharedDecoder, adapters=adapters)
    list(answer(backbone, prompts, batch_size=2, max_new_tokens=8, eos={2}, make=make))
    assert [p.answer for p in prompts] == wanted
