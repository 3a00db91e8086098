"""Write demo.json: what transformers makes of the demo model's GGUF file, ids and logits.

    python -m tests.golden.make_demo path/to/SmolLM2-135M-Instruct.Q4_1.gguf

transformers reads the vocabulary but not how the file says text is cut (`tokenizer.ggml.pre`: digits one by one, then
GPT-2's pattern), so it splits "\\n\\n1" and numbers beyond ASCII otherwise than the model was trained. Both are kept:
its own ids, and its ids once its tokenizer has been told the cut. They differ only where `told` is not null.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.golden.demo_texts import CHATS, LOGIT_PROMPTS, demo_texts

GOLDEN = Path(__file__).with_name("demo.json")
NUM_TOP = 40


def packed(ids: list[int]) -> str:
    """Ids below 65536 as base64 of little-endian 16-bit numbers."""
    return base64.b64encode(np.array(ids, "<u2").tobytes()).decode()


def tell_the_cut(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def read_logits(model: Any, ids: list[int]) -> dict[str, Any]:
    """The last row's greatest logits, and the sum and spread of all rows as a check on the rest."""
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0].double().numpy()
    top = np.argsort(-rows[-1])[:NUM_TOP]
    return {
        "ids": packed(ids),
        "top_ids": packed(top.tolist()),
        "top_logits": [round(float(value), 5) for value in rows[-1][top]],
        "row_means": [round(float(value), 5) for value in rows.mean(axis=1)],
        "row_spreads": [round(float(value), 5) for value in rows.std(axis=1)],
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    path = parser.parse_args(argv).gguf
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    texts = demo_texts()
    own = [tokenizer(text)["input_ids"] for text in texts]
    tell_the_cut(tokenizer)
    told = [tokenizer(text)["input_ids"] for text in texts]
    chats = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        for chat in CHATS
    ]
    golden = {
        "ids": [packed(ids) for ids in own],
        "told": [
            packed(ids) if ids != other else None for ids, other in zip(told, own, strict=True)
        ],
        "chats": [packed(ids) for ids in chats],
        "logits": [read_logits(model, chats[number]) for number in LOGIT_PROMPTS],
    }
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
