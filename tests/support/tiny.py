"""Tiny seeded models and a byte tokenizer, built from mlx-lm's and transformers' own classes.

Small enough to run thousands of times, random enough that a wrong mask, position or norm shows: norms are not one,
biases not zero, and logits spread over several units, so float32 noise does not decide an argmax.
"""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny_models import randomize

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
VOCAB_SIZE = 256
PAD, SYSTEM, USER, ASSISTANT, EOS = 0, 252, 253, 254, 255
"""Special tokens take ids of bytes that occur in no valid UTF-8 text (and of NUL); every other id is its byte."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '>' + message['content'] + '<eos>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def tiny_config(model_type: str = "llama", **overrides: Any) -> dict[str, Any]:
    """Return the config.json of a tiny model: 4 layers, width 64, 4 query heads on 2 key heads."""
    config: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": EOS,
    }
    if model_type == "qwen2":
        del config["head_dim"]  # qwen2 derives it
    return {**config, **overrides}


def tiny_model(model_type: str = "llama", *, seed: int = 0, **overrides: Any) -> nn.Module:
    """Return a float32 model of mlx-lm with weights that depend on `seed` and the config alone.

    The state of MLX's global random generator is left as it was.
    """
    config = tiny_config(model_type, **overrides)
    module = {"mistral": "llama"}.get(model_type, model_type)  # as mlx-lm maps it
    architecture = importlib.import_module(f"mlx_lm.models.{module}")
    model = architecture.Model(architecture.ModelArgs.from_dict(config))
    randomize(model, seed)
    return model


@cache
def hf_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids are the UTF-8 bytes of a text, with a chat template and special tokens."""
    specials = {
        "<pad>": PAD,
        "<system>": SYSTEM,
        "<user>": USER,
        "<assistant>": ASSISTANT,
        "<eos>": EOS,
    }
    taken = set(specials.values())
    vocabulary = {letter: byte for byte, letter in enumerate(byte_letters()) if byte not in taken}
    return byte_level_tokenizer({**vocabulary, **specials})


def byte_level_tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    """Return a tokenizer that splits a text into bytes and merges nothing; with the special tokens and template."""
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def byte_letters() -> list[str]:
    """Return the printable letter that byte-level tokenizers write for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in letters)
    letters.update({byte: chr(256 + n) for n, byte in enumerate(others)})
    return [letters[byte] for byte in range(256)]


def byte_tokenizer() -> TokenizerWrapper:
    """Return the byte tokenizer as mlx-lm hands one to its callers."""
    return TokenizerWrapper(hf_byte_tokenizer(), BPEStreamingDetokenizer)


def save_tiny_model(
    folder: Path, model_type: str = "llama", *, seed: int = 0, **overrides: Any
) -> Path:
    """Write a tiny model and its tokenizer as a folder that `mlx_lm.load` reads; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(tiny_model(model_type, seed=seed, **overrides).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = tiny_config(model_type, **overrides)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    hf_byte_tokenizer().save_pretrained(folder)
    return folder
