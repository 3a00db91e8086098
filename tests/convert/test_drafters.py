"""Published drafters convert: every layout, what they draft afterwards, and what is refused."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_specstream.config import DecodeConfig, TreeSpec
from mlx_specstream.convert import cli
from mlx_specstream.errors import CheckpointError, OptionError, StreamsError
from mlx_specstream.loading.drafter import drafter_in
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.speculation.drafting import drafter_decoder
from mlx_specstream.speculation.result import MaxTokens
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.weights.drafter import load_drafter, save_drafter
from tests.convert import drafter_checkpoints as made
from tests.reference import drafters as reference
from tests.support import tiny

SIZES = {
    "hidden_size": made.H, "intermediate_size": 40, "num_hidden_layers": made.LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": made.V,
    "rope_theta": 70.0,
}  # fmt: skip
PROMPT = [3, 14, 15, 2, 5, 35]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_tiny_model(tmp_path_factory.mktemp("base") / "llama", **SIZES)


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model("llama", **SIZES)


def convert(source, target, *options):
    assert cli.main(["--hf-path", str(source), "--mlx-path", str(target), *options]) == 0
    return load_drafter(target)


@pytest.mark.parametrize("kind", made.WRITERS)
def test_a_published_drafter_drafts_as_its_weights_say(tmp_path, base, model, kind):
    """Every draft of a chain is what the slow reference computes from the file's own tensors."""
    state = made.WRITERS[kind](tmp_path / "published")
    weights = convert(tmp_path / "published", tmp_path / "out", "--base", str(base))
    assert weights.base.fingerprint
    floats = {name: value for name, value in weights.tensors.items() if name != "d2t"}
    # Nothing but copies of the embedding, buffers and the table is lost or made up.
    published = {
        name: value
        for name, value in state.items()
        if not name.endswith(("embed_tokens.weight", "inv_freq", "d2t", "t2d"))
    }
    assert sum(value.size for value in floats.values()) == sum(v.size for v in published.values())
    backbone = Backbone(model)
    drafter = drafter_in(tmp_path / "out", model, backbone)
    config = DecodeConfig(TreeSpec.parse("chain2"))
    decoder = drafter_decoder(drafter, config, TokenSampler(), keep_drafts=True)
    next_log_probs = reference.of_trained(model, weights.config, weights.tensors)
    cache, text, seen = backbone.new_cache(), list(PROMPT), 0
    decoder.begin(PROMPT, cache)
    decoder.prefill(PROMPT[:-1], cache)
    for step in decoder.steps(PROMPT[-1], cache, MaxTokens(8)):
        path = []
        for token in step.draft.tokens[1:]:
            log_probs = next_log_probs(text, path)
            assert log_probs[token] > log_probs.max() - 1e-3
            path.append(token)
            seen += 1
        text += step.tokens
    assert seen > 4


def test_the_draft_vocabulary_is_that_of_the_offsets(tmp_path, base):
    state = made.eagle3(tmp_path / "published")
    weights = convert(tmp_path / "published", tmp_path / "out", "--base", str(base))
    expected = state["d2t"] + np.arange(40)
    np.testing.assert_array_equal(np.array(weights.tensors["d2t"]), expected)
    assert weights.config.feature_layers == (2, 2, 1)  # 2, N / 2, N − 3 of four layers


def test_named_feature_layers_are_those_after_the_named_ones(tmp_path):
    """SpecForge names layers by their outputs, so no base is needed."""
    settings = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "use_aux_hidden_state": True}
    made.eagle3(tmp_path / "published", eagle_config=settings, prefix="layers.0")
    weights = convert(tmp_path / "published", tmp_path / "out")
    assert weights.config.feature_layers == (1, 2, 3)
    assert weights.base is None


@pytest.mark.parametrize("prefix", ["medusa_head.", "heads.", ""])
def test_heads_saved_with_a_prefix_and_several_blocks_are_found(tmp_path, prefix):
    made.medusa(tmp_path / "published", blocks=2, prefix=prefix)
    weights = convert(tmp_path / "published", tmp_path / "out")
    assert (weights.config.num_heads, weights.config.num_blocks) == (3, 2)
    assert weights.base.name == "lmsys/vicuna-7b-v1.3"


@pytest.mark.parametrize(("qkv_bias", "fc_bias"), [(True, False), (False, True)])
def test_biases_are_where_the_weights_have_them(tmp_path, qkv_bias, fc_bias):
    made.eagle(tmp_path / "published", qkv_bias=qkv_bias, fc_bias=fc_bias)
    config = convert(tmp_path / "published", tmp_path / "out").config
    assert (config.layer.attention_bias, config.bias) == (qkv_bias, fc_bias)


def test_a_dtype_is_asked_for(tmp_path):
    made.eagle(tmp_path / "published")
    weights = convert(tmp_path / "published", tmp_path / "out", "--stream-dtype", "float16")
    assert {value.dtype for value in weights.tensors.values()} == {mx.float16}


def test_a_dry_run_names_every_tensor(tmp_path, base, capsys):
    made.eagle3(tmp_path / "published")
    arguments = ["--hf-path", str(tmp_path / "published"), "--base", str(base), "--dry-run"]
    assert cli.main(arguments) == 0
    told = capsys.readouterr().out
    assert "layer.hidden_norm.weight" in told
    assert "offsets to ids" in told


REFUSED = {
    "Hydra++ without its base": ("hydra++", {}, "give its folder as --base"),
    "EAGLE-3 without its base": ("eagle3", {}, "give its folder as --base"),
    "heads that know nothing": ("hydra", {"grounded_heads": False}, "grounded_heads false"),
    "an activation": ("eagle", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "a scaling": ("eagle", {"rope_scaling": {"type": "dynamic"}}, "rope_scaling is of the type"),
    "no width": ("eagle", {"hidden_size": None}, "hidden_size is None"),
    "other heads": ("eagle", {"num_attention_heads": 8}, "q_proj"),
    "no config": ("eagle", None, "config.json is missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_said_in_a_sentence(tmp_path, name):
    kind, changes, told = REFUSED[name]
    made.WRITERS[kind](tmp_path / "published", **(changes or {}))
    if changes is None:
        (tmp_path / "published" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=told) as caught:
        convert(tmp_path / "published", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["medusa", "hydra", "eagle", "eagle3"])
def test_a_tensor_too_many_or_missing_is_named(tmp_path, base, kind):
    state = made.WRITERS[kind](tmp_path / "published")
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    more = {**state, "odd.weight": np.zeros((2, 2), np.float32)}
    last = [key for key in state if key.endswith(".weight")][-1]
    less = {key: value for key, value in state.items() if key != last}
    for name, changed in (("more", more), ("less", less)):
        made.write(tmp_path / name, changed, config)
        with pytest.raises(CheckpointError) as caught:
            convert(tmp_path / name, tmp_path / "out", "--base", str(base))
        assert "\n" not in str(caught.value)


def test_options_of_models_are_refused(tmp_path):
    made.medusa(tmp_path / "published")
    with pytest.raises(OptionError, match="holds a drafter"):
        convert(tmp_path / "published", tmp_path / "out", "-q")
    with pytest.raises(OptionError, match="--check"):
        convert(tmp_path / "published", tmp_path / "out", "--check")


def test_another_base_is_refused(tmp_path, base):
    made.eagle(tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "out", "--base", str(base))
    other = tiny.tiny_model("llama", seed=5, **SIZES)
    with pytest.raises(StreamsError, match="belong to another base model"):
        drafter_in(tmp_path / "out", other, Backbone(other))
    narrow = tiny.tiny_model("llama", **{**SIZES, "hidden_size": 16})
    made.eagle(tmp_path / "bare")
    convert(tmp_path / "bare", tmp_path / "unnamed")
    with pytest.raises(StreamsError, match="of width 32"):
        drafter_in(tmp_path / "unnamed", narrow, Backbone(narrow))


DAMAGE = {
    "a kind": ({"kind": "magic"}, "kind must be one of"),
    "a field": ({"more": 1}, "unknown field 'more'"),
    "a version": ({"version": 9}, "version 9 is not known"),
    "a size": ({"hidden_size": True}, "hidden_size must be"),
    "a word": ({"own_head": "yes"}, "own_head must be true or false"),
    "no layer": ({"layer": None}, "needs a layer"),
    "layers": ({"feature_layers": [0]}, "takes features of 3 layers"),
    "a table": ({"draft_vocab_size": 39}, "expected"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_config_that_makes_no_sense_is_refused(tmp_path, base, name):
    made.eagle3(tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "out", "--base", str(base))
    changes, told = DAMAGE[name]
    path = tmp_path / "out" / "drafter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(StreamsError, match=told) as caught:
        load_drafter(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_table_must_name_tokens_of_the_base(tmp_path, base):
    made.eagle3(tmp_path / "published")
    weights = convert(tmp_path / "published", tmp_path / "out", "--base", str(base))
    for bad in (made.V, -1, 3):
        table = mx.array([bad, *weights.tensors["d2t"].tolist()[1:-1], 3], dtype=mx.int32)
        with pytest.raises(StreamsError, match="different tokens"):
            save_drafter(
                tmp_path / "bad", weights.config, {**weights.tensors, "d2t": table},
                base_model=None, fingerprint=None,
            )  # fmt: skip
    assert not (tmp_path / "bad").exists()


LIES = {
    "offsets beyond any integer": ({"d2t": np.full(40, 1 << 40)}, {}, "d2t"),
    "offsets below them": ({"d2t": np.full(40, -(1 << 63))}, {}, "d2t"),
    "ids for offsets": ({"d2t": np.arange(40) + 21}, {}, "d2t"),
    "a scalar": ({"d2t": np.array(3)}, {}, r"d2t is I64 \(\), expected integers"),
    "a table of another draft vocabulary": ({"d2t": np.arange(40) // 2}, {}, "name different tokens"),
    "a head without its table": (
        {"lm_head.weight": np.ones((made.V + 3, made.H)), "d2t": None}, {}, "draft_vocab_size must be",
    ),
    "a head that is no matrix": ({"lm_head.weight": np.ones(())}, {}, "lacks the matrix lm_head.weight"),
    "features that are no matrix": ({"fc.weight": np.ones(96)}, {}, "lacks the matrix fc.weight"),
    "layers that the base lacks": (
        {}, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}}, "of layers up to 4, and the base has 3",
    ),
    "tokens that the base lacks": ({}, {"vocab_size": made.V + 1}, f"of tokens {made.V + 1}"),
}  # fmt: skip


@pytest.mark.parametrize("with_mask", [True, False], ids=["t2d", "no t2d"])
@pytest.mark.parametrize("name", LIES)
def test_an_eagle_that_lies_is_refused_before_anything_is_written(tmp_path, base, name, with_mask):
    tensors, fields, told = LIES[name]
    state = made.eagle3(tmp_path / "published")
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    for key, value in tensors.items():
        state[key] = (
            None if value is None else value.astype(np.int64 if key == "d2t" else np.float32)
        )
    if not with_mask:
        state.pop("t2d")
        if "another draft" in name:  # a table like any other, where nothing says which tokens
            return
    made.write(
        tmp_path / "lies", {k: v for k, v in state.items() if v is not None}, {**config, **fields}
    )
    with pytest.raises((CheckpointError, StreamsError), match=told) as caught:
        convert(tmp_path / "lies", tmp_path / "out", "--base", str(base))
    assert "partial" not in str(caught.value)
    assert not (tmp_path / "out").exists()
