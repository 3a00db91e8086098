from __future__ import annotations

import ast
import inspect
import io
from collections import Counter
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_specstream.config import DecodeConfig, PruneSpec, StreamConfig, TreeSpec
from mlx_specstream.errors import ModelError, OptionError, StreamsError
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.cache import KVCache
from mlx_specstream.speculation import decode as decode_module
from mlx_specstream.speculation.drafters import StreamDrafter
from mlx_specstream.speculation.plain import PlainDecoder
from mlx_specstream.speculation.result import MaxTokens, StepReport
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.streams import Streams
from mlx_specstream.speculation.tree import DraftTree, chain, root_only
from tests.reference import tree as reference
from tests.support.engine import (
    ALL_MODULES,
    Decoded,
    assert_same_text,
    decode,
    examples,
    is_compiling,
    mlx_lm_tokens,
    plain,
    random_streams,
    random_tensors,
    small_model,
    stream_config,
    stream_decoder,
    table_decoder,
)


def prompt_of(length: int, vocab: int, seed: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, vocab, length)]


def assert_records_hold(run: Decoded, prompt: Sequence[int], dead_nodes: bool) -> None:
    """Check every step's tree against what the step emitted."""
    root = prompt[-1]
    for step in run.steps:
        draft = step.draft
        assert draft is not None
        assert len(draft.tokens) == len(draft.parents) == len(draft.depths) == step.drafted + 1
        assert draft.tokens[0] == root
        assert draft.depths == [len(p) - 1 for p in reference.paths(draft.tokens, draft.parents)]
        assert draft.accepted[0] == 0
        assert len(draft.accepted) == len(step.tokens) == step.accepted + 1
        for above, node, token in zip(
            draft.accepted, draft.accepted[1:], step.tokens, strict=False
        ):
            assert draft.parents[node] == above
            assert draft.tokens[node] == token
        last = draft.accepted[-1]
        children = [n for n in range(1, len(draft.tokens)) if draft.parents[n] == last]
        if not dead_nodes:
            assert step.tokens[-1] not in [draft.tokens[n] for n in children]
        assert step.logits.shape[0] == len(step.tokens)
        assert mx.argmax(step.logits, axis=-1).tolist() == step.tokens
        assert step.origins == [*range(1, len(step.tokens)), 0]
        root = step.tokens[-1]


trees = st.one_of(
    st.builds(TreeSpec, kind=st.just("chain"), branching=st.just(1), depth=st.integers(0, 4)),
    st.builds(
        TreeSpec,
        kind=st.just("best"),
        rows=st.integers(1, 24),
        branching=st.integers(1, 9),
        depth=st.integers(0, 4),
    ),
    st.builds(
        TreeSpec, kind=st.just("product"), branching=st.integers(1, 3), depth=st.integers(1, 2)
    ),
)
prunes = st.one_of(
    st.none(),
    st.builds(PruneSpec, keep=st.integers(1, 16), threshold=st.sampled_from([0.0, 0.02, 0.3])),
)


@st.composite
def stream_configs(draw: st.DrawFn, layers: int) -> StreamConfig:
    conditioned = draw(st.booleans())
    mode = draw(st.sampled_from(["lossless", "shared"]))
    modules = draw(st.sets(st.sampled_from(ALL_MODULES), max_size=4))
    return stream_config(
        num_streams=draw(st.integers(1, 5)),
        num_msa_layers=draw(st.integers(1, layers - 1)),
        mode=mode,
        next_token_rank=draw(st.sampled_from([0, 3])) if mode == "lossless" else 0,
        rope_offset=draw(st.sampled_from(["position_plus_stream", "position"])),
        stream_init_rank=draw(st.sampled_from([0, 3])),
        value_rotation=draw(st.sampled_from([0.0, 0.2])),
        target_modules=tuple(sorted(modules)),
        lora_rank=4 if modules else 0,
        conditioner_rank=3 if conditioned else 0,
        conditioner_hidden=5 if conditioned else 0,
        conditioner_tokens=draw(st.integers(1, 2)) if conditioned else 1,
    )


@pytest.mark.parametrize("branching", [31, 33, 64])
@pytest.mark.parametrize("conditioned", [True, False])
def test_a_product_tree_has_all_its_candidates(branching: int, conditioned: bool) -> None:
    """Also those beyond the ones that are conditioned on their parent where trees are narrow."""
    fields = {} if conditioned else {"conditioner_rank": 0, "conditioner_hidden": 0}
    streams = random_streams(small_model(layers=3, vocab=96), stream_config(**fields))
    tree = TreeSpec("product", branching=branching, depth=1)
    found = decode(stream_decoder(streams, DecodeConfig(tree), keep_drafts=True), [1, 2, 3], 8)
    drafts = [step.draft for step in found.steps if step.drafted]
    assert drafts
    for draft in drafts:
        assert draft is not None
        assert len(set(draft.tokens[1:])) == len(draft.tokens) - 1 == branching
    assert_same_text(found.tokens, plain(streams, [1, 2, 3], 12))


@examples(60)
@given(st.data())
def test_greedy_text_is_that_of_plain_decoding(data: st.DataObject) -> None:
    draw = data.draw
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    layers, seed = draw(st.integers(2, 6)), draw(st.integers(0, 9))
    vocab, attention = draw(st.sampled_from([(12, 1.0), (12, 0.5), (64, 0.3)]))
    window = draw(st.sampled_from([None, None, 6])) if family == "llama" else None
    model = small_model(family, layers, vocab, seed, attention, window)
    streams = random_streams(model, draw(stream_configs(layers)), seed)
    schedules = ["auto", "deferred"] + ["inline"] * (not streams.know_next_token)
    schedule = "inline" if streams.shared else draw(st.sampled_from(schedules))
    few = schedule == "inline" and not streams.shared
    config = DecodeConfig(
        draw(trees),
        draw(prunes),
        schedule,
        draw(st.booleans()),
        stream_nodes=draw(st.integers(0, 3)) if few else 0,
    )
    prompt = prompt_of(draw(st.integers(1, 40)), vocab, seed)
    make = draw(st.sampled_from([stream_decoder, table_decoder]))
    run = decode(
        make(streams, config, keep_drafts=True), prompt, 20, chunk=draw(st.integers(1, 41))
    )
    expected = plain(streams, prompt, 20)
    assert_same_text(run.tokens, expected)
    dead = config.prune is not None and config.prune.threshold > 0
    assert_records_hold(run, prompt, dead)
    assert run.cache.length == len(prompt) - 1 + len(run.tokens)
    longest = max(step.accepted for step in run.steps)
    event(f"{'shared' if streams.shared else 'lossless'}: longest path {longest}")
    if not streams.shared:
        assert_same_text(mlx_lm_tokens(model, prompt, 20), expected)


@pytest.mark.parametrize("attention", [0.1, 0.3])
@pytest.mark.parametrize("mode", ["lossless", "shared"])
def test_long_paths_are_accepted(mode: str, attention: float) -> None:
    """The other tests would be empty if drafts were never right: here they are, to the end."""
    model = small_model(layers=3, vocab=64, attention=attention, seed=3)
    streams = random_streams(model, stream_config(mode=mode, num_streams=4), scale=0.05)
    prompts = [prompt_of(7, 64, seed) for seed in range(4)]
    expected = [plain(streams, prompt, 16) for prompt in prompts]
    for tree, prune in (("chain", None), ("12", None), ("2^3", None), ("12", PruneSpec(9))):
        config = DecodeConfig(TreeSpec.parse(tree), prune)
        paths: Counter[int] = Counter()
        for prompt, wanted in zip(prompts, expected, strict=True):
            run = decode(table_decoder(streams, config, keep_drafts=True), prompt, 16)
            assert_same_text(run.tokens, wanted)
            assert_records_hold(run, prompt, dead_nodes=False)
            paths.update(step.accepted for step in run.steps[1:])
        assert paths[3 if tree == "2^3" else 4] > 1, (tree, paths)
        assert len(paths) > 1, (tree, paths)


def test_streams_of_their_own_are_accepted_too() -> None:
    """Random guesses hit in a small vocabulary; also on branches that are not the first."""
    streams = random_streams(small_model(layers=3, vocab=12, seed=2), stream_config(), 2)
    others = 0
    for seed in range(3):
        prompt = prompt_of(4, 12, seed)
        config = DecodeConfig(TreeSpec(rows=16))
        run = decode(stream_decoder(streams, config, keep_drafts=True), prompt, 25)
        assert_same_text(run.tokens, plain(streams, prompt, 25))
        others += sum(
            step.draft.accepted != list(range(len(step.tokens)))
            for step in run.steps
            if step.draft is not None
        )
    assert others > 3


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("mode", ["lossless", "shared"])
def test_other_precisions_decode(mode: str, dtype: mx.Dtype, bits: int) -> None:
    """Near-ties may fall differently there; a larger gap than rounding must not."""
    model = small_model("qwen3", layers=3, vocab=64, seed=40 + bits, intermediate_size=64)
    try:
        model.set_dtype(dtype)
        if bits:
            nn.quantize(model, group_size=32, bits=bits)
        streams = random_streams(model, stream_config(mode=mode, value_rotation=0.1))
        config = DecodeConfig(TreeSpec(rows=10), PruneSpec(8))
        for make in (stream_decoder, table_decoder):
            run = decode(make(streams, config), prompt_of(6, 64, 0), 20)
            expected = plain(streams, prompt_of(6, 64, 0), 20)
            for place, (a, b) in enumerate(zip(run.tokens, expected.tokens, strict=False)):
                if a != b:
                    assert dtype != mx.float32
                    logits = expected.steps[place].logits[0].astype(mx.float32)
                    assert (logits[b] - logits[a]).item() < 0.3
                    break
    finally:
        small_model.cache_clear()


PROCESSORS = {
    "repetition": {"repetition_penalty": 1.7, "repetition_context_size": 5},
    "bias": {"logit_bias": {3: 2.5, 7: -4.0}},
    "presence and frequency": {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    "all": {"repetition_penalty": 1.2, "logit_bias": {1: 1.0}, "frequency_penalty": 0.3},
}


@pytest.mark.parametrize("name", list(PROCESSORS))
@pytest.mark.parametrize("kind", ["chain", "12", "3^2", "pruned chain", "pruned tree"])
def test_processors_see_every_rows_own_history(name: str, kind: str) -> None:
    model = small_model(layers=3, vocab=12, seed=1)
    streams = random_streams(model, stream_config(num_streams=4), 1)
    prompt = prompt_of(9, 12, 4)
    expected = mlx_lm_tokens(
        model, prompt, 30, logits_processors=make_logits_processors(**PROCESSORS[name])
    )
    assert expected != mlx_lm_tokens(model, prompt, 30)
    pruned = kind.startswith("pruned")
    shape = {"pruned chain": "chain", "pruned tree": "12"}.get(kind, kind)
    config = DecodeConfig(TreeSpec.parse(shape), PruneSpec(5, 0.01) if pruned else None)
    for make in (stream_decoder, table_decoder):
        token_sampler = TokenSampler(processors=make_logits_processors(**PROCESSORS[name]))
        decoder = make(streams, config, token_sampler=token_sampler)
        run = decode(decoder, prompt, 30)
        assert run.tokens[:30] == expected
        assert token_sampler.history == prompt + run.tokens
        if make is table_decoder and shape != "chain":
            assert run.accepted > 0
    token_sampler = TokenSampler(processors=make_logits_processors(**PROCESSORS[name]))
    assert plain(streams, prompt, 30, token_sampler=token_sampler).tokens == expected


def test_processors_in_shared_mode() -> None:
    """There the oracle is a step of the root alone, with its streams."""
    model = small_model(layers=3, vocab=12, seed=1)
    streams = random_streams(model, stream_config(mode="shared"), 1)

    def token_sampler() -> TokenSampler:
        return TokenSampler(processors=make_logits_processors(**PROCESSORS["all"]))

    expected = plain(streams, [4, 2], 20, token_sampler=token_sampler())
    decoder = table_decoder(streams, DecodeConfig(TreeSpec(rows=10)), token_sampler=token_sampler())
    run = decode(decoder, [4, 2], 20)
    assert run.accepted > 0
    assert_same_text(run.tokens, expected)


@pytest.mark.parametrize("xtc", [0.0, 0.5])
def test_a_seed_gives_one_text_whatever_the_tree(xtc: float) -> None:
    """Also sampled text is plain decoding's, token for token."""
    streams = random_streams(small_model(layers=3, vocab=12, seed=2), stream_config(), 2)

    def text(seed: int, config: DecodeConfig | None) -> list[int]:
        mx.random.seed(seed)
        token_sampler = TokenSampler(make_sampler(temp=1.0, top_p=0.9, xtc_probability=xtc))
        if config is None:
            return plain(streams, [1, 2, 3], 25, token_sampler=token_sampler).tokens
        run = decode(table_decoder(streams, config, token_sampler=token_sampler), [1, 2, 3], 25)
        assert run.accepted > 0
        return run.tokens[:25]

    expected = text(1, None)
    for config in (
        DecodeConfig(TreeSpec(rows=8)),
        DecodeConfig(TreeSpec.parse("chain")),
        DecodeConfig(TreeSpec(rows=12), PruneSpec(5)),
    ):
        assert text(1, config) == expected
    assert text(2, DecodeConfig(TreeSpec(rows=8))) != expected


@pytest.mark.parametrize("where", ["layer", "norm", "head row", "embedding row"])
@pytest.mark.parametrize("sampler", [None, make_sampler(temp=1.0), make_sampler(0.8, top_p=0.9)])
def test_damaged_weights_are_an_error(where: str, sampler: object) -> None:
    model = small_model(layers=3, vocab=40, seed=21, tie_word_embeddings=False)
    nan = float("nan")
    try:
        if where == "layer":
            model.layers[1].mlp.up_proj.weight[3, 5] = nan
        elif where == "norm":
            model.model.norm.weight[0] = nan
        elif where == "head row":
            model.lm_head.weight[33] = nan
        else:
            model.model.embed_tokens.weight[2] = nan
        streams = random_streams(model, stream_config())
        config = DecodeConfig(TreeSpec(rows=6))
        for decoder in (
            stream_decoder(streams, config, TokenSampler(sampler)),  # type: ignore[arg-type]
            PlainDecoder(streams.backbone, TokenSampler(sampler)),  # type: ignore[arg-type]
        ):
            with pytest.raises(ModelError, match="not a number") as caught:
                decode(decoder, [1, 2], 5)
            assert "\n" not in str(caught.value)
    finally:
        small_model.cache_clear()


@pytest.mark.parametrize("tensor", ["stream_embeddings", "conditioner.mlp_out"])
@pytest.mark.parametrize("vocab", [12, 20000])
@pytest.mark.parametrize("tree", ["chain", "9"])
def test_streams_that_overflow_only_draft_badly(tensor: str, vocab: int, tree: str) -> None:
    """Lossless: whatever the streams say, even nothing, the text is the model's."""
    model = small_model(layers=2, vocab=vocab, seed=1)
    backbone, config = Backbone(model), stream_config(num_msa_layers=1)
    for value in (float("nan"), float("inf"), 1e30):
        tensors = random_tensors(backbone, config)
        tensors[tensor] = mx.full(tensors[tensor].shape, value)
        streams = Streams(backbone, config, tensors)
        decoder = stream_decoder(streams, DecodeConfig(TreeSpec.parse(tree)), keep_drafts=True)
        run = decode(decoder, [1, 2, 3], 5)
        assert_same_text(run.tokens, plain(streams, [1, 2, 3], 5))
        for step in run.steps:
            assert step.draft is not None
            assert min(step.draft.tokens) >= 0
            assert max(step.draft.tokens) < vocab


def test_streams_at_few_nodes_draft_only_where_the_path_ends() -> None:
    """With streams at 2 of 8 nodes a path that ends elsewhere is followed by a root alone.

    Where it does end at one of them, the next tree is the one that streams everywhere give.
    """
    model = small_model(layers=3, vocab=64, attention=0.3, seed=3)
    streams = random_streams(model, stream_config(num_streams=3), scale=0.05)
    prompt = prompt_of(7, 64, 0)
    everywhere = DecodeConfig(TreeSpec(rows=8), schedule="inline")
    few = DecodeConfig(TreeSpec(rows=8), schedule="inline", stream_nodes=2)
    all_steps = decode(table_decoder(streams, everywhere, keep_drafts=True), prompt, 60)
    steps = decode(table_decoder(streams, few, keep_drafts=True), prompt, 60)
    assert_same_text(steps.tokens, plain(streams, prompt, 60))
    trees: dict[int, list[int]] = {}
    at = 0
    for step in all_steps.steps:
        assert step.draft is not None
        trees[at] = step.draft.tokens
        at += len(step.tokens)
    rows: Counter[int] = Counter()
    at = 0
    for step in steps.steps:
        assert step.draft is not None
        rows[len(step.draft.tokens)] += 1
        if len(step.draft.tokens) > 1 and at in trees:
            assert step.draft.tokens == trees[at]
        at += len(step.tokens)
    assert set(rows) == {1, 8}
    assert rows[8] > 1
    assert rows[1] > 1  # the first step and at least one more


def test_what_cannot_be_is_refused() -> None:
    model = small_model(layers=3)
    bare = random_streams(model, stream_config(pruner_rank=0))
    with pytest.raises(StreamsError, match="pruning needs an early-exit pruner"):
        stream_decoder(bare, DecodeConfig(prune=PruneSpec(4)))
    shared = random_streams(model, stream_config(mode="shared"))
    with pytest.raises(OptionError, match="'deferred' needs lossless streams"):
        stream_decoder(shared, DecodeConfig(schedule="deferred"))
    with pytest.raises(OptionError, match="stream_nodes needs lossless streams"):
        stream_decoder(shared, DecodeConfig(schedule="inline", stream_nodes=2))
    backbone = Backbone(model)
    for lost, config in (
        ("pruner.lora_b", DecodeConfig(prune=PruneSpec(4))),
        ("conditioner.mlp_in", DecodeConfig()),
    ):
        tensors = random_tensors(backbone, stream_config())
        del tensors[lost]
        streams = Streams(backbone, stream_config(), tensors)
        with pytest.raises(StreamsError, match=lost.replace(".", r"\.")):
            stream_decoder(streams, config)


class TestOneSynchronisation:
    """A step is one graph, and the loop waits for one array of integers per step."""

    @pytest.mark.parametrize("kind", ["inline", "deferred", "shared"])
    @pytest.mark.parametrize("tree", ["chain", "12", "2^2"])
    def test_building_a_step_evaluates_nothing(self, kind: str, tree: str) -> None:
        """A step can be traced by `mx.compile`, where any look at a value is an error."""
        mode = "shared" if kind == "shared" else "lossless"
        streams = random_streams(small_model(layers=3), stream_config(mode=mode))
        schedule = "deferred" if kind == "deferred" else "inline"
        decoder = stream_decoder(
            streams,
            DecodeConfig(TreeSpec.parse(tree), PruneSpec(4, 0.1), schedule),  # type: ignore[arg-type]
            token_sampler=TokenSampler(make_sampler(0.9, top_p=0.9, top_k=5)),
        )
        cache = KVCache(3)
        decoder.prefill([1, 2, 3], cache)

        def build(tokens: mx.array) -> tuple[mx.array, mx.array]:
            parents = mx.array([0, 0, 1, 1, 0, 2], dtype=mx.int32)
            depths = mx.array([0, 1, 2, 2, 1, 3], dtype=mx.int32)
            step = decoder.stepper.step(DraftTree(tokens, parents, depths, 3), cache)
            return step.report.packed, step.next_tree.tokens

        if not is_compiling():
            pytest.skip("no C++ compiler: MLX compiles nothing here")
        report, following = mx.compile(build)(mx.arange(6, dtype=mx.int32))
        assert report.shape[1] > 2
        assert following.shape[0] > 1

        def looks(tokens: mx.array) -> mx.array:
            return mx.zeros(int(tokens[0].item()) + 1)

        with pytest.raises(ValueError, match="eval"):
            mx.compile(looks)(mx.arange(6))

    def test_the_loop_waits_once_per_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        waits = []
        real = StepReport.read

        def counted(report: StepReport) -> object:
            waits.append(1)
            return real(report)

        def refuse(*_: object) -> None:
            raise AssertionError("a second synchronisation")

        streams = random_streams(small_model(layers=3), stream_config())
        decoder = stream_decoder(streams, DecodeConfig(TreeSpec(rows=8)))
        cache = KVCache(3)
        decoder.prefill([1, 2, 3], cache)
        monkeypatch.setattr(StepReport, "read", counted)
        monkeypatch.setattr(decode_module, "to_ints", refuse)
        monkeypatch.setattr(mx, "eval", refuse)
        results = list(decoder.steps(4, cache, MaxTokens(12)))
        assert len(results) == len(waits) > 5

    @pytest.mark.parametrize("tree", ["chain", "12"])
    def test_the_report_does_not_wait_for_the_streams(
        self, tree: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is evaluated first holds no stream; the next tree follows in an evaluation of its own."""
        streams = random_streams(small_model(layers=3), stream_config())
        decoder = stream_decoder(streams, DecodeConfig(TreeSpec.parse(tree), schedule="deferred"))
        cache = KVCache(3)
        decoder.prefill([1, 2, 3], cache)
        evaluated: list[tuple[mx.array, ...]] = []
        monkeypatch.setattr(mx, "async_eval", lambda *arrays: evaluated.append(arrays))
        step = decoder.stepper.step(chain(mx.arange(4)), cache)
        step.schedule()
        assert [id(step.report.packed), id(step.logits)] == [id(x) for x in evaluated[0]]
        assert [id(x) for x in step.next_tree.arrays] == [id(x) for x in evaluated[1][:-1]]

        def products(*arrays: mx.array) -> int:
            graph = io.StringIO()
            mx.export_to_dot(graph, *arrays)
            return graph.getvalue().count('label ="Matmul"')

        first, all_of_it = products(*evaluated[0]), products(*evaluated[0], *evaluated[1])
        assert first > 7 * 3
        assert all_of_it > first + 7 * 2

    def test_no_other_module_of_the_step_looks_at_values(self) -> None:
        from mlx_specstream.speculation import (
            accept,
            condition,
            drafting,
            prune,
            sampling,
            step,
            streams,
            tree,
        )
        from mlx_specstream.speculation.drafters import (
            draft_model,
            drafter,
            eagle,
            hydra,
            medusa,
            own_rows,
            unrolled,
        )
        from mlx_specstream.speculation.drafters import streams as stream_drafter

        parts = (accept, condition, prune, sampling, step, streams, tree, decode_module, drafting)
        own = (draft_model, drafter, eagle, hydra, medusa, own_rows, unrolled, stream_drafter)
        for module in (*parts, *own):
            for node in ast.walk(ast.parse(inspect.getsource(module))):
                if isinstance(node, ast.Attribute):
                    assert node.attr not in {"item", "tolist", "eval", "synchronize"}, module


def test_streams_that_know_the_next_token_follow_the_token_that_was_drawn() -> None:
    """What a step drafts is what streams read off the finished text draft there, token known."""
    model = small_model(layers=4, vocab=64, attention=0.3)
    streams = random_streams(model, stream_config(next_token_rank=3), scale=2.0)
    chain = TreeSpec(kind="chain", branching=1)
    prompt = prompt_of(6, 64, 6)
    config = DecodeConfig(chain, use_conditioner=False)
    run = decode(stream_decoder(streams, config, keep_drafts=True), prompt, 24)
    text = [*prompt, *run.tokens]
    drafter = StreamDrafter(streams, inline=True)
    root, changed = len(prompt) - 1, 0
    for step in run.steps:
        assert step.draft is not None
        if len(step.draft.tokens) > 1:
            cache = KVCache(streams.backbone.num_layers)
            streams.forward(mx.array(text[: root - 1]), cache)
            cache.advance(root - 1)
            last = root_only(mx.array(text[root - 1 : root]))
            found = []
            for following in (text[root], (text[root] + 7) % 64):
                seen = drafter.verify(last, cache, mx.array([following]))
                states = streams.backbone.norm(seen.streams[:, 0])
                found.append(mx.argmax(streams.backbone.head(states)[0], axis=-1).tolist())
            assert step.draft.tokens[1:] == found[0]
            changed += found[0] != found[1]
        root += len(step.tokens)
    assert changed > 5


def test_streams_that_know_the_next_token_are_never_inline() -> None:
    streams = random_streams(small_model(), stream_config(next_token_rank=3))
    with pytest.raises(OptionError, match="'inline' cannot be used with these streams"):
        stream_decoder(streams, DecodeConfig(schedule="inline"))
    for schedule in ("auto", "deferred"):
        drafter = stream_decoder(streams, DecodeConfig(schedule=schedule)).drafter  # type: ignore[arg-type]
        assert isinstance(drafter, StreamDrafter)
        assert not drafter.inline
        assert not drafter.root_inline
    with pytest.raises(StreamsError, match="next_token_rank needs mode 'lossless'"):
        stream_config(mode="shared", next_token_rank=3)
