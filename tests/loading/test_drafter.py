"""What drafts in place of streams, from a name on the command line to an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_specstream import DecodeConfig, TreeSpec, cli, load, stream_generate
from mlx_specstream.errors import ModelError, OptionError, StreamsError
from mlx_specstream.speculation.drafters.own_rows import OwnRows
from mlx_specstream.weights.drafter import save_drafter
from tests.support import tiny
from tests.support.drafters import TRAINED, drafter_config, random_drafter_tensors

PROMPT = [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft model: other weights, fewer layers, the same tokenizer."""
    return tiny.save_tiny_model(
        tmp_path_factory.mktemp("draft") / "small", "qwen3", seed=3, num_hidden_layers=2
    )


@pytest.fixture(scope="module")
def adapters(tiny_llama: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind of trained drafter, for the tiny llama."""
    folders = {}
    for kind in TRAINED:
        config = drafter_config(kind, 64, 256, 4)
        folders[kind] = tmp_path_factory.mktemp("adapter") / kind
        tensors = random_drafter_tensors(config)
        save_drafter(folders[kind], config, tensors, base_model="tiny", fingerprint=None)
    return folders


def answer(model: object, tokenizer: TokenizerWrapper, **options: object) -> list[int]:
    options = {"max_tokens": 12, "config": DecodeConfig(TreeSpec(rows=6)), **options}
    return [r.token for r in stream_generate(model, tokenizer, PROMPT, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [*TRAINED, "draft model"])
def test_a_drafter_is_named_and_the_text_stays_the_models_own(
    kind: str, tiny_folder: Path, draft_folder: Path, adapters: dict[str, Path]
) -> None:
    name = str(draft_folder if kind == "draft model" else adapters[kind])
    model, tokenizer = load(str(tiny_folder), draft_model=name)
    assert model.drafter is not None
    assert model.streams is None
    assert model.streams_name == name
    plain, _ = load(str(tiny_folder), streams=None)
    assert answer(model, tokenizer) == answer(plain, tokenizer)
    assert answer(model, tokenizer, speculative=False) == answer(plain, tokenizer)
    *_, last = stream_generate(model, tokenizer, PROMPT, 12, num_draft_tokens=2)
    assert 0 < last.stats.drafted <= 2 * last.stats.passes
    if kind != "draft model":  # the same folder, named as streams are
        same, _ = load(str(tiny_folder), streams=name)
        assert type(same.drafter) is type(model.drafter)


def test_a_prompt_cache_goes_on_with_the_drafters_rows(
    tiny_folder: Path, adapters: dict[str, Path]
) -> None:
    model, tokenizer = load(str(tiny_folder), draft_model=adapters["eagle"])
    cache = model.backbone.new_cache()
    first = answer(model, tokenizer, prompt_cache=cache)
    said = [first[-1], 7, 8]
    second = [r.token for r in stream_generate(model, tokenizer, said, 9, prompt_cache=cache)]
    assert isinstance(cache.companion, OwnRows)
    assert cache.companion.first == 0
    assert cache.companion.kv.length >= cache.length - 1
    plain, _ = load(str(tiny_folder), streams=None)
    text = [*PROMPT, *first[:-1], *said]
    expected = [r.token for r in stream_generate(plain, tokenizer, text, 9)]
    assert second == expected


def test_a_service_that_reads_prompts_itself_tells_the_drafter(
    tiny_folder: Path, adapters: dict[str, Path]
) -> None:
    model, _ = load(str(tiny_folder), draft_model=adapters["eagle3"])
    cache = model.backbone.new_cache()
    assert list(model.prefill(PROMPT, cache, 4)) == [4, 6]
    assert isinstance(cache.companion, OwnRows)
    assert cache.companion.kv.length == 5


def test_mlx_lms_own_draft_model_drafts(
    tiny_folder: Path, tiny_model: Callable[..., nn.Module]
) -> None:
    plain, tokenizer = load(str(tiny_folder), streams=None)
    draft = tiny_model("qwen2", num_hidden_layers=2, seed=9)
    found = answer(plain.model, tokenizer, draft_model=draft, num_draft_tokens=3)
    assert found == answer(plain, tokenizer)
    # A copy of the model drafts what it says itself: all drafts are accepted.
    same = stream_generate(plain, tokenizer, PROMPT, 13, draft_model=plain, num_draft_tokens=3)
    *_, last = same
    assert last.stats.tokens_per_step > 3


@pytest.mark.parametrize("verb", ["generate", "verify"])
def test_the_command_line_takes_a_drafter(
    verb: str, tiny_folder: Path, adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [verb, "--model", str(tiny_folder), "--draft-model", str(adapters["hydra"])]
    words += ["--max-tokens", "8", "--json"]
    words += ["-p", "hi"] if verb == "generate" else ["--num-prompts", "1", "--tree", "6"]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found


def test_what_cannot_draft_is_said_in_a_sentence(
    tiny_folder: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    tiny_model: Callable[..., nn.Module],
) -> None:
    plain, tokenizer = load(str(tiny_folder), streams=None)
    with pytest.raises(OptionError, match="cannot both draft"):
        load(str(tiny_folder), streams="demo-chat", draft_model=str(adapters["medusa"]))
    other = tiny.save_tiny_model(tmp_path / "other")
    path = other / "tokenizer.json"
    fields = json.loads(path.read_text())
    vocabulary = fields["model"]["vocab"]
    one, two = [token for token in vocabulary if vocabulary[token] in (65, 66)]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(fields))
    with pytest.raises(ModelError, match=r"another vocabulary than the model: '.' is token 6"):
        load(str(tiny_folder), draft_model=str(other))
    with pytest.raises(ModelError, match="it has 300 tokens and the model 256"):
        answer(plain, tokenizer, draft_model=tiny_model(vocab_size=300))
    wide = drafter_config("medusa", 96, 256, 4)
    tensors = random_drafter_tensors(wide)
    save_drafter(tmp_path / "wide", wide, tensors, base_model=None, fingerprint=None)
    with pytest.raises(StreamsError, match="for a model of width 96"):
        load(str(tiny_folder), draft_model=str(tmp_path / "wide"))
    larger = drafter_config("medusa", 64, 300, 4)
    tensors = random_drafter_tensors(larger)
    save_drafter(tmp_path / "larger", larger, tensors, base_model=None, fingerprint=None)
    with pytest.raises(StreamsError, match="vocabulary of at least 300"):
        load(str(tiny_folder), draft_model=str(tmp_path / "larger"))
    config = drafter_config("eagle", 64, 256, 4)
    tensors = random_drafter_tensors(config)
    tensors["fc.bias"] = tensors["fc.bias"] * mx.array(float("nan"))
    with pytest.raises(StreamsError, match="holds NaN"):
        save_drafter(tmp_path / "nan", config, tensors, base_model=None, fingerprint=None)
