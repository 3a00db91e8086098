"""Every request of a batch gets what it gets alone, whoever comes and goes beside it."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_specstream.batch import BatchDecoder
from mlx_specstream.batch.chains import Chains
from mlx_specstream.config import CacheConfig, DecodeConfig, PruneSpec, TreeSpec
from mlx_specstream.errors import ModelError, OptionError
from mlx_specstream.loading.load import StreamModel
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.cache import KVCache
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.streams import Streams
from tests.batch.engine import (
    CHAIN,
    Request,
    as_model,
    assert_draws_follow,
    assert_fresh,
    batch_decoder,
    finish,
    prompt_of,
    step,
    streamed,
)
from tests.support import against_mlx_lm, tiny
from tests.support.batched import with_batch_table
from tests.support.engine import (
    assert_same_text,
    decode,
    examples,
    plain,
    random_tensors,
    small_model,
    stream_config,
    stream_decoder,
)
from tests.support.tiny_models import tiny_random_model

LENGTHS = (5, 1, 19, 3)


def assert_as_alone(request: Request, streams: Streams) -> None:
    """Fail unless the tokens are plain decoding's and the cache is a fresh prefill's."""
    assert request.error is None
    assert_same_text(request.tokens, plain(streams, request.prompt, len(request.tokens)))


@pytest.mark.parametrize("schedule", ["inline", "deferred"])
def test_requests_decode_as_alone(tiny_family: object, schedule: str) -> None:
    model = streamed(tiny_family)  # type: ignore[arg-type]
    decoder = batch_decoder(model, schedule, prefill_budget=8)
    requests = [Request(decoder, prompt_of(n, n, 200), 20) for n in LENGTHS]
    finish(decoder, requests)
    assert model.streams is not None
    for request in requests:
        assert_as_alone(request, model.streams)


def test_a_report_does_not_wait_for_the_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is evaluated together is ready together: the report and logits are, before the drafts."""
    decoder = batch_decoder(streamed(small_model(layers=3)), "deferred")
    for seed in range(2):
        decoder.add(prompt_of(5, seed))
    tokens = mx.zeros((2, 3), dtype=mx.int32)
    samplers = [TokenSampler(), TokenSampler()]
    decoder.step()  # the prompts are read
    made = decoder.stepper.step(Chains(tokens, [3, 3]), samplers, decoder.cache)
    evaluated: list[tuple[mx.array, ...]] = []
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: evaluated.append(arrays))
    made.schedule()
    assert [[id(array) for array in arrays] for arrays in evaluated] == [
        [id(made.report.packed), id(made.logits)],
        [id(made.next_tokens)],
    ]


@pytest.mark.parametrize("conditioned", [True, False])
@pytest.mark.parametrize("schedule", ["inline", "deferred", "next token known"])
@pytest.mark.parametrize("depth", [0, 2])
def test_drafts_are_those_of_a_request_alone(schedule: str, conditioned: bool, depth: int) -> None:
    """Streams, candidates and acceptance are the single loop's, step by step."""
    model = streamed(small_model())
    if schedule == "next token known":
        schedule = "deferred"
        model = streamed(small_model(), next_token_rank=3, conditioner_tokens=2)
    assert model.streams is not None
    chain = TreeSpec(kind="chain", branching=1, depth=depth)
    config = DecodeConfig(chain, schedule=schedule, use_conditioner=conditioned)  # type: ignore[arg-type]
    decoder = BatchDecoder(model, config, prefill_budget=6, keep_drafts=True)
    requests = [Request(decoder, prompt_of(n, n), 24) for n in LENGTHS]
    finish(decoder, requests)
    accepted = 0
    for request in requests:
        alone = decode(
            stream_decoder(model.streams, config, keep_drafts=True), request.prompt, 24
        ).steps
        assert [r.tokens for r in request.results] == [r.tokens for r in alone]
        assert [r.draft for r in request.results] == [r.draft for r in alone]
        assert [r.drafted for r in request.results] == [r.drafted for r in alone]
        for own, wanted in zip(request.results, alone, strict=True):
            np.testing.assert_allclose(np.array(own.logits), np.array(wanted.logits), atol=1e-4)
        accepted += sum(r.accepted for r in request.results)
    assert accepted > 3


@pytest.mark.parametrize("gates", [False, True])
def test_shared_mode(gates: bool) -> None:
    backbone = Backbone(small_model(layers=4))
    config = stream_config(mode="shared")
    streams = Streams(backbone, config, random_tensors(backbone, config, gates=gates))
    for speculative in (True, False):
        decoder = batch_decoder(as_model(streams), prefill_budget=8, speculative=speculative)
        requests = [Request(decoder, prompt_of(n, n), 16) for n in LENGTHS]
        finish(decoder, requests)
        for request in requests:
            assert_as_alone(request, streams)


@pytest.mark.parametrize("schedule", ["inline", "deferred"])
@pytest.mark.parametrize("window", [1, 4])
def test_sliding_windows(schedule: str, window: int) -> None:
    model = streamed(small_model("qwen3" if window == 1 else "llama", window=window))
    assert model.streams is not None
    decoder = batch_decoder(model, schedule, keep_drafts=True)
    requests = [Request(decoder, prompt_of(n, n), 16) for n in LENGTHS]
    finish(decoder, requests)
    for request in requests:
        assert_as_alone(request, model.streams)
        alone = stream_decoder(
            model.streams, DecodeConfig(CHAIN, schedule=schedule), keep_drafts=True
        )
        steps = decode(alone, request.prompt, 16).steps
        assert [r.draft for r in request.results] == [r.draft for r in steps]


def test_value_rotation_and_positions() -> None:
    model = streamed(small_model(), value_rotation=0.3, rope_offset="position")
    assert model.streams is not None
    for schedule in ("inline", "deferred"):
        decoder = batch_decoder(model, schedule, keep_drafts=True)
        requests = [Request(decoder, prompt_of(n, n), 16) for n in LENGTHS]
        finish(decoder, requests)
        for request in requests:
            alone = stream_decoder(
                model.streams, DecodeConfig(CHAIN, schedule=schedule), keep_drafts=True
            )
            steps = decode(alone, request.prompt, 16).steps
            assert [r.draft for r in request.results] == [r.draft for r in steps]


def test_model_without_streams_is_decoded_plainly() -> None:
    model = small_model()
    decoder = batch_decoder(StreamModel.plain(model))
    requests = [Request(decoder, prompt_of(n, n), 12) for n in LENGTHS]
    finish(decoder, requests)
    for request in requests:
        streams = streamed(model).streams
        assert streams is not None
        assert_as_alone(request, streams)
        assert all(result.drafted == 0 for result in request.results)


@pytest.mark.parametrize(
    "name", ["gpt_oss", "ministral3", "deepseek_v3", "nemotron-nas", "gemma4_text"]
)
def test_families_that_differ_from_llama(name: str) -> None:
    """Sinks, scales by position, latent attention, layers without attention."""
    model = tiny_random_model(name)
    streams = against_mlx_lm.random_streams(Backbone(model))
    for schedule in ("inline", "deferred"):
        decoder = batch_decoder(as_model(streams), schedule)
        requests = [Request(decoder, prompt_of(n, n, 10), 16) for n in (7, 1, 25)]
        finish(decoder, requests)
        for request in requests:
            assert request.error is None
            wanted = plain(streams, request.prompt, 16, cache=streams.backbone.new_cache())
            assert_same_text(request.tokens, wanted)


def test_layers_with_a_state_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(small_model())
    calls = [dataclasses.replace(call, slots=1) for call in model.backbone.calls]
    monkeypatch.setattr(model.backbone, "calls", calls)
    with pytest.raises(ModelError, match=r"'llama' cannot be batched \(it has layers that keep"):
        batch_decoder(model)


@pytest.mark.parametrize(
    ("groups", "reason"), [(2, "logits in a batch differ"), (3, "do not take a mask per sequence")]
)
def test_layers_that_would_mix_up_sequences_are_refused(groups: int, reason: str) -> None:
    """gemma2 of mlx-lm spreads a mask over groups of heads, whatever its first axis means."""
    model = tiny_random_model("gemma2", num_attention_heads=6, num_key_value_heads=groups)
    with pytest.raises(ModelError, match=reason):
        batch_decoder(StreamModel.plain(model))
    alone = tiny_random_model("gemma2", num_attention_heads=2, num_key_value_heads=2)
    assert not batch_decoder(StreamModel.plain(alone)).busy


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 30), st.integers(0, 9), st.integers(1, 30)),
        st.tuples(st.just("remove"), st.integers(0, 9), st.just(0), st.just(0)),
        st.tuples(st.just("steps"), st.integers(1, 6), st.just(0), st.just(0)),
    ),
    min_size=2,
    max_size=14,
)


@examples(25)
@given(actions, st.sampled_from(["inline", "deferred"]), st.integers(1, 40))
def test_any_order_of_joining_and_leaving(
    script: list[tuple[str, int, int, int]], schedule: str, budget: int
) -> None:
    """Texts are plain decoding's, and caches fresh prefills', in whatever state a sequence leaves."""
    model = streamed(small_model(attention=0.25))
    assert model.streams is not None
    decoder = with_batch_table(batch_decoder(model, schedule, prefill_budget=budget))
    requests: list[Request] = []
    caches: list[KVCache | None] = []

    def take_out(place: int) -> None:
        request = requests[place]
        assert model.streams is not None
        state, computed = request.sequence.state, request.sequence.prefilled
        event(f"removed while {state}")
        cache = caches[place] = decoder.remove(request.sequence)
        prompt = list(request.prompt)
        text = prompt[:computed] if state == "waiting" else [*prompt, *request.tokens[:-1]]
        if not request.tokens and state == "running":
            text = prompt[:-1]
        assert_fresh(cache, model.streams, text)

    for name, first, second, third in script:
        if name == "add" and len(requests) < 8:
            requests.append(Request(decoder, prompt_of(first, second), third))
            caches.append(None)
        elif name == "remove" and first < len(requests) and caches[first] is None:
            take_out(first)
        elif name == "steps":
            for _ in range(first):
                step(decoder, requests)
    finish(decoder, requests)
    for place, request in enumerate(requests):
        if caches[place] is None:
            assert request.sequence.state == "finished"
            assert len(request.tokens) >= request.limit
            take_out(place)
        assert_as_alone(request, model.streams)
    if sum(result.accepted for r in requests for result in r.results) > 10:
        event("more than ten drafts accepted")
    assert decoder.nbytes == 0


def test_a_cache_goes_back_into_a_batch() -> None:
    model = streamed(small_model())
    assert model.streams is not None
    decoder = batch_decoder(model)
    other = Request(decoder, prompt_of(7, 3), 60)
    first = Request(decoder, prompt_of(9, 1), 10)
    while first.sequence.state != "finished":
        step(decoder, [first, other])
    text = [*first.prompt, *first.tokens]
    cache = decoder.remove(first.sequence)
    turn = prompt_of(4, 2)
    second = Request(decoder, [text[-1], *turn], 10, cache=cache)
    finish(decoder, [other, second])
    expected = plain(model.streams, [*text, *turn], 10)
    assert_same_text(second.tokens, expected)
    assert_fresh(
        decoder.remove(second.sequence), model.streams, [*text, *turn, *second.tokens[:-1]]
    )
    assert_as_alone(other, model.streams)


@pytest.mark.parametrize("schedule", ["inline", "deferred"])
def test_samplers_and_processors_are_each_requests_own(schedule: str) -> None:
    """With a seed, a request draws what plain decoding draws, whatever shares the batch."""
    model = streamed(small_model())
    assert model.streams is not None
    decoder = batch_decoder(model, schedule, prefill_budget=8)
    sampler = make_sampler(temp=1.0, top_k=8)
    penalties = tuple(make_logits_processors(repetition_penalty=1.7))
    settings = [(sampler, ()), (None, penalties), (None, ()), (sampler, penalties), (sampler, ())]
    requests = [
        Request(decoder, prompt_of(3 + 4 * n, n), 20, None, how, processors, seed=n)
        for n, (how, processors) in enumerate(settings)
    ]
    finish(decoder, requests)
    greedy = [plain(model.streams, request.prompt, 20).tokens[:20] for request in requests]
    for number, request in enumerate(requests):
        alone = plain(model.streams, request.prompt, 25, token_sampler=request.token_sampler())
        assert request.tokens == alone.tokens[: len(request.tokens)]
        assert request.sequence.token_sampler.history == [*request.prompt, *request.tokens]
        assert (request.tokens[:20] == greedy[number]) == (number == 2)
    assert sum(result.accepted for r in requests for result in r.results) > 3


def test_draws_of_a_batch_follow_the_models_distribution() -> None:
    """Eight equal requests at a time, each with a seed of its own: the first two tokens' pairs."""
    vocab = 5
    model = streamed(small_model(vocab=vocab, seed=3), num_streams=2)
    assert model.streams is not None
    prompt = [3, 1, 4]
    decoder = with_batch_table(batch_decoder(model))
    assert_draws_follow(decoder, model, prompt, vocab)


def model_that_never_says_eleven() -> StreamModel:
    model = tiny.tiny_model(
        num_hidden_layers=3,
        hidden_size=32,
        intermediate_size=48,
        head_dim=8,
        vocab_size=12,
        tie_word_embeddings=False,
    )
    model.lm_head.weight[11] = 0.0
    return streamed(model, conditioner_rank=0, conditioner_hidden=0)


@pytest.mark.parametrize("schedule", ["inline", "deferred"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_stays_with_its_request(schedule: str, place: int) -> None:
    """Also for requests that come later and get the rows it had."""
    model = model_that_never_says_eleven()
    assert model.streams is not None
    decoder = batch_decoder(model, schedule)
    model.model.model.embed_tokens.weight[11] = float("nan")
    prompts = [prompt_of(n, n, 11) for n in (6, 9)]
    prompts.insert(place, [11] * 40)
    requests = [Request(decoder, prompt, 30) for prompt in prompts]
    while requests[place].sequence.state != "failed":
        step(decoder, requests)
    error = requests[place].error
    assert isinstance(error, ModelError)
    assert "NaN" in str(error)
    assert requests[place].tokens == []
    requests += [Request(decoder, prompt_of(n, n, 11), 30) for n in (1, 3, 4)]
    finish(decoder, requests)
    assert len({decoder.remove(request.sequence).length for request in requests}) > 1
    requests.pop(place)
    for request in requests:
        assert_as_alone(request, model.streams)


def test_streams_that_overflow_cost_only_drafts() -> None:
    """Stream rows of earlier passes lie in masked columns, where NaN times 0 would be NaN."""
    backbone = Backbone(small_model(layers=4))
    config = stream_config(target_modules=("self_attn.v_proj",))
    tensors = random_tensors(backbone, config)
    tensors["layers.3.self_attn.v_proj.lora_b"] *= float("inf")
    model = as_model(Streams(backbone, config, tensors))
    assert model.streams is not None
    for schedule in ("inline", "deferred"):
        decoder = batch_decoder(model, schedule)
        # The longest one reaches further than the others' scratch rows.
        requests = [Request(decoder, prompt_of(n, n), 16) for n in (3, 5, 60)]
        finish(decoder, requests)
        for request in requests:
            assert_as_alone(request, model.streams)


def test_what_a_processor_or_callback_raises_stays_with_its_request() -> None:
    model = streamed(small_model())
    assert model.streams is not None
    decoder = batch_decoder(model)

    def broken(history: mx.array, logits: mx.array) -> mx.array:
        if history.shape[0] > 12:
            raise RuntimeError("processor")
        return logits

    good = [Request(decoder, prompt_of(n, n), 24) for n in (4, 8)]
    bad = Request(decoder, prompt_of(6, 6), 24, processors=[broken])

    class Shout:
        def should_continue(self, result: object) -> bool:
            raise RuntimeError("callback")

    sequence = decoder.add(prompt_of(3, 3), criteria=Shout())
    errors = {}
    while decoder.busy:
        for which, _, error in decoder.step():
            if error is not None:
                errors[id(which)] = str(error)
    assert errors == {id(bad.sequence): "processor", id(sequence): "callback"}
    assert sequence.state == "failed"
    assert_same_text(bad.tokens, plain(model.streams, bad.prompt, len(bad.tokens)))
    for request in good:
        assert_as_alone(request, model.streams)


def test_long_prompts_do_not_hold_up_the_others() -> None:
    model = streamed(small_model())
    decoder = batch_decoder(model, prefill_budget=10)
    running = Request(decoder, prompt_of(4, 1), 200)
    step(decoder, [running])
    long = Request(decoder, prompt_of(95, 2), 5)
    short = Request(decoder, prompt_of(6, 3), 5)
    requests = [running, long, short]
    seen = []
    while long.sequence.state == "waiting":
        before, given = long.sequence.prefilled, len(running.results)
        step(decoder, requests)
        assert long.sequence.prefilled - before <= 10
        assert len(running.results) == given + 1
        seen.append(short.sequence.state)
    assert len(seen) >= 10
    assert "running" in seen[:2]
    finish(decoder, requests)


def test_one_synchronisation_and_the_next_step_is_scheduled_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = streamed(small_model())
    decoder = batch_decoder(model)
    requests = [Request(decoder, prompt_of(n, n), 30) for n in (3, 4)]
    step(decoder, requests)
    scheduled = []
    original = type(decoder.stepper).step

    def note(self: object, *arguments: object) -> object:
        scheduled.append(len(requests[0].results))
        return original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(type(decoder.stepper), "step", note)
    evaluations = []
    for name in ("eval", "synchronize"):
        monkeypatch.setattr(mx, name, lambda *_, name=name: evaluations.append(name))
    for count in range(1, 6):
        step(decoder, requests)
        assert scheduled[-1] == count == len(requests[0].results)
    assert evaluations == []


def rows_of(length: int) -> KVCache:
    """Return a cache of three layers, one head of 128 channels and random rows."""
    cache = KVCache(3)
    for layer in cache.layers:
        layer.write(0, mx.random.normal((1, 1, length, 128)), mx.random.normal((1, 1, length, 128)))
    cache.advance(length)
    mx.eval(cache.arrays)
    return cache


@pytest.mark.parametrize("schedule", ["inline", "deferred"])
def test_steps_update_the_buffers_in_place(schedule: str) -> None:
    model = streamed(small_model(num_attention_heads=1, num_key_value_heads=1, head_dim=128))
    decoder = batch_decoder(model, schedule)
    mx.synchronize()
    before = mx.get_active_memory()
    requests = [Request(decoder, [1], 1000, cache=rows_of(n)) for n in (4000, 3000, 50)]
    for _ in range(3):
        step(decoder, requests)
    for request in requests:
        request.cache = None  # its rows are the batch's now
    mx.synchronize()
    mx.reset_peak_memory()
    for _ in range(4):
        step(decoder, requests)
    mx.synchronize()
    one_buffer = decoder.nbytes / 6
    assert mx.get_peak_memory() - before < decoder.nbytes + one_buffer


def test_what_cannot_be_batched_is_refused() -> None:
    model = streamed(small_model())
    for config in (
        DecodeConfig(CHAIN, PruneSpec(keep=2)),
        DecodeConfig(CHAIN, schedule="inline", stream_nodes=1),
    ):
        with pytest.raises(OptionError, match="not pruned"):
            BatchDecoder(model, config)
    with pytest.raises(OptionError, match="prefill_budget"):
        batch_decoder(model, prefill_budget=0)
    decoder = batch_decoder(model)
    with pytest.raises(OptionError, match="empty"):
        decoder.add([])
    with pytest.raises(OptionError, match="2 layers"):
        decoder.add([1], cache=KVCache(2))
    for kind in (CacheConfig(max_kv_size=8), CacheConfig(kv_bits=8)):
        with pytest.raises(OptionError, match="rotates or is quantised"):
            decoder.add([1], cache=model.backbone.new_cache(kind))
    assert not decoder.busy
    sequence = decoder.add([1, 2, 3])
    assert decoder.remove(sequence).length == 0
    with pytest.raises(OptionError, match="not in the batch"):
        decoder.remove(sequence)
    waiting = batch_decoder(model).add([1])
    with pytest.raises(OptionError, match="not in the batch"):
        decoder.remove(waiting)
