"""A model that always gives one written answer, as a folder that `load` reads, with streams.

Its weights are a table. Width = vocabulary, embeddings are one-hot, layers add nothing, and the
head says "after piece k comes piece k + 1"; the answer's pieces are tokens of their own that no
text is ever cut into. The streams' adapters shift by one piece, so stream 1 is always right and
the others, which say the same, never are: two tokens a step, and something to strike through.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from mlx_specstream.config import StreamConfig
from mlx_specstream.weights.checkpoint import fingerprint, save_streams
from tests.support import tiny

NUM_STREAMS = 2
ANSWER = """\
# Fruit

Three **fruits** I like, 你好 and 👍🏽:

- apple
- pear with a rather long explanation that has to be wrapped on most screens there are
- <b>quince</b>

```python
def add(a, b):
    return a + b
```

That is *all*, naïve as it is.
"""


def pieces_of(text: str, marks: Sequence[str] = ()) -> list[bytes]:
    """Cut a text into different pieces of a few bytes, so that long characters fall apart.

    marks: texts that are one piece each.
    """
    pieces: list[bytes] = []
    for part in re.split(f"({'|'.join(map(re.escape, marks))})", text) if marks else [text]:
        data, start = part.encode(), 0
        while start < len(data):
            end = len(data) if part in marks else start + 4
            while data[start:end] in pieces and end < len(data):
                end += 1
            end += len(data) - end == 1  # a byte alone has a token already
            pieces.append(data[start:end])
            start = end
    return pieces


def save_parrot(
    folder: Path,
    answer: str = ANSWER,
    context: int = 2048,
    marks: Sequence[str] = (),
    template: str | None = None,
) -> Path:
    """Write the model, its tokenizer and its streams; return the folder.

    marks: parts of the answer that are control tokens, each at most once. Where a template ends
    with such a token, the answer is what comes behind it.
    """
    pieces = pieces_of(answer, marks)
    vocab = 256 + len(pieces)
    model_config = tiny.tiny_config(
        hidden_size=vocab,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=vocab + vocab % 2,
        vocab_size=vocab,
        max_position_embeddings=context,
        tie_word_embeddings=False,
    )
    llama = importlib.import_module("mlx_lm.models.llama")
    model = llama.Model(llama.ModelArgs.from_dict(model_config))

    def weight(path: str, old: mx.array) -> mx.array:
        if "norm" in path:
            return mx.ones(old.shape)
        if "embed_tokens" in path:
            return mx.eye(vocab)
        if "lm_head" in path:
            return _following(len(pieces))
        return mx.zeros(old.shape)

    model.update(tree_map_with_path(weight, model.parameters()))
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(model_config, indent=1))
    tokenizer = _tokenizer(pieces)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    assert len(tokenizer.get_vocab()) == vocab
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)

    width = model_config["head_dim"]
    config = StreamConfig(
        num_streams=NUM_STREAMS,
        num_msa_layers=1,
        rope_offset="position",
        lora_rank=vocab,
        lora_alpha=float(vocab),
        target_modules=tuple(f"self_attn.{name}_proj" for name in "qkvo"),
    )
    one, into, out = mx.eye(vocab), mx.eye(vocab, width), mx.eye(width, vocab)
    shift = _following(len(pieces)).T - one  # e_k -> e_(k+1) - e_k
    tensors = {"stream_embeddings": mx.zeros((NUM_STREAMS, vocab))}
    for name, a, b in (
        ("q", one, into),
        ("k", one, into),
        ("v", one / vocab**0.5, into),
        ("o", out, shift),
    ):
        tensors[f"layers.1.self_attn.{name}_proj.lora_a"] = a
        tensors[f"layers.1.self_attn.{name}_proj.lora_b"] = b
    save_streams(folder, config, tensors, base_model="parrot", fingerprint=fingerprint(model))
    return folder


def _following(num_pieces: int) -> mx.array:
    """Return (V, V): row i has a one in column k if token i follows token k."""
    vocab = 256 + num_pieces
    table = mx.zeros((vocab, vocab))
    chain = [tiny.ASSISTANT, *range(256, vocab), tiny.EOS]
    for before, after in pairwise(chain):
        table[after, before] = 1.0
    return table


def _tokenizer(pieces: Sequence[bytes]) -> PreTrainedTokenizerFast:
    """Return the byte tokenizer with the answer's pieces as further tokens, which nothing merges to."""
    letters, plain = tiny.byte_letters(), tiny.hf_byte_tokenizer()
    vocabulary = dict(plain.get_vocab())
    for place, piece in enumerate(pieces):
        vocabulary["".join(letters[byte] for byte in piece)] = 256 + place
    assert len(vocabulary) == 256 + len(pieces)
    return tiny.byte_level_tokenizer(vocabulary)
