from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_specstream.config import StreamConfig
from mlx_specstream.errors import StreamsError
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.cache import KVCache
from mlx_specstream.speculation.drafters import StreamDrafter
from mlx_specstream.speculation.streams import Streams, pass_mask, rotate_values
from mlx_specstream.speculation.tree import DraftTree
from tests.reference.forward import Reference
from tests.support.engine import (
    ALL_MODULES,
    examples,
    random_streams,
    random_tensors,
    small_model,
    stream_config,
)

PREFIX = [3, 1, 4, 1, 5]
#      2 ─┬─ 6 ─── 5
#         └─ 3 ─┬─ 6      node 3 and node 1 hold the same token, node 6 and node 3 too
#               └─ 2 ─── 6
TOKENS, PARENTS, DEPTHS = [2, 6, 3, 6, 5, 2, 6], [0, 0, 0, 2, 1, 2, 5], [0, 1, 1, 2, 2, 2, 3]
FOLLOWING = [6, 9, 2, 0, 9, 6, 7]  # what is drawn after each node


def tree() -> DraftTree:
    arrays = (mx.array(a, dtype=mx.int32) for a in (TOKENS, PARENTS, DEPTHS))
    return DraftTree(*arrays, depth=3)


def verify(streams: Streams, prefix: list[int], inline: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return main rows (T, h) and streams (T, γ, h), normed, as the engine computes them."""
    cache = KVCache(streams.backbone.num_layers)
    if prefix:
        streams.forward(mx.array(prefix), cache)
        cache.advance(len(prefix))
    drafter = StreamDrafter(streams, inline)
    following = mx.array(FOLLOWING, dtype=mx.int32)
    verified = drafter.verify(tree(), cache, following)
    states = [
        drafter.stream_states(verified, mx.array(node, dtype=mx.int32), following[node], cache)
        for node in range(len(TOKENS))
    ]
    normed = streams.backbone.norm(mx.concatenate(states))
    return np.array(verified.last[0]), np.array(normed)


configs = st.builds(
    lambda **fields: stream_config(
        **fields | ({"next_token_rank": 0} if fields["mode"] == "shared" else {})
    ),
    num_streams=st.integers(1, 4),
    num_msa_layers=st.integers(1, 2),
    mode=st.sampled_from(["lossless", "shared"]),
    rope_offset=st.sampled_from(["position_plus_stream", "position"]),
    stream_init_rank=st.sampled_from([0, 3]),
    next_token_rank=st.sampled_from([0, 3]),
    value_rotation=st.sampled_from([0.0, 0.3]),
    target_modules=st.sets(st.sampled_from(ALL_MODULES), min_size=1).map(
        lambda names: tuple(sorted(names))
    ),
)
families = st.sampled_from(["llama", "mistral", "qwen2", "qwen3"])


@examples(40)
@given(families, configs, st.integers(0, 5), st.integers(0, 3))
def test_inline_pass_against_numpy(
    family: str, config: StreamConfig, prefix: int, seed: int
) -> None:
    model = small_model(family, layers=3, seed=seed)
    streams = random_streams(model, config, seed)
    main, rows = verify(streams, PREFIX[:prefix], inline=True)
    reference = Reference(model, config, streams.tensors)
    wanted_main, wanted_rows, _ = reference.run(PREFIX[:prefix], TOKENS, PARENTS, FOLLOWING)
    np.testing.assert_allclose(main, wanted_main, atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose(rows, wanted_rows, atol=2e-4, rtol=1e-4)


@examples(30)
@given(families, configs, st.integers(0, 5), st.integers(0, 3))
def test_deferred_streams_are_the_inline_ones(
    family: str, config: StreamConfig, prefix: int, seed: int
) -> None:
    config = StreamConfig(**{**vars(config), "mode": "lossless"})
    streams = random_streams(small_model(family, layers=3, seed=seed), config, seed)
    inline, deferred = (verify(streams, PREFIX[:prefix], inline=i) for i in (True, False))
    np.testing.assert_allclose(inline[0], deferred[0], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(inline[1], deferred[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_lossless_main_rows_are_the_base_models(family: str, inline: bool) -> None:
    """Whatever the streams are: here adapters a hundred times larger than the weights."""
    model = small_model(family, layers=3)
    config = stream_config(value_rotation=1.0)
    streams = random_streams(model, config, scale=100.0)
    main, _ = verify(streams, PREFIX, inline)
    head = streams.backbone.head
    logits = np.array(head(mx.array(main)))
    for node, path in enumerate([[0], [0, 1], [0, 2], [0, 2, 3], [0, 1, 4], [0, 2, 5]]):
        text = mx.array([PREFIX + [TOKENS[n] for n in path]])
        np.testing.assert_allclose(logits[node], np.array(model(text)[0, -1]), atol=1e-4, rtol=1e-5)


def test_sliding_windows_reach_streams() -> None:
    model = small_model(layers=4, window=3)
    for mode in ("lossless", "shared"):
        config = stream_config(mode=mode, num_msa_layers=3)
        streams = random_streams(model, config)
        wanted_main, wanted_rows, _ = Reference(model, config, streams.tensors).run(
            PREFIX, TOKENS, PARENTS
        )
        for inline in (True, False) if mode == "lossless" else (True,):
            main, rows = verify(streams, PREFIX, inline)
            np.testing.assert_allclose(main, wanted_main, atol=2e-4, rtol=1e-4)
            np.testing.assert_allclose(rows, wanted_rows, atol=2e-4, rtol=1e-4)


def test_gates_weigh_what_main_sees_of_its_streams() -> None:
    model = small_model(layers=3)
    backbone, config = Backbone(model), stream_config(mode="shared")
    tensors = random_tensors(backbone, config, gates=True)
    main, rows = verify(Streams(backbone, config, tensors), PREFIX, inline=True)
    wanted_main, wanted_rows, _ = Reference(model, config, tensors).run(PREFIX, TOKENS, PARENTS)
    np.testing.assert_allclose(main, wanted_main, atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose(rows, wanted_rows, atol=2e-4, rtol=1e-4)
    open_main, _ = verify(random_streams(model, config), PREFIX, inline=True)
    assert np.abs(open_main - main).max() > 0.01
    # A gate that is shut: main rows are those of plain next-token LoRA.
    shut = {n: mx.full(t.shape, -1e9) if "gate" in n else t for n, t in tensors.items()}
    lone = verify(Streams(backbone, config, shut), PREFIX, inline=True)[0]
    streams = Streams(backbone, config, shut)
    text = mx.array([*PREFIX, TOKENS[0], TOKENS[2], TOKENS[5]])
    plain = backbone.norm(streams.forward(text, KVCache(3)))
    np.testing.assert_allclose(lone[[0, 2, 5]], np.array(plain[0, -3:]), atol=1e-4)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("mode", ["lossless", "shared"])
def test_half_precision_streams_stay_in_it(dtype: mx.Dtype, mode: str) -> None:
    model = small_model(layers=3, seed=77)  # not shared with other tests: it changes type
    model.set_dtype(dtype)
    try:
        config = stream_config(mode=mode, value_rotation=0.1)
        streams = random_streams(model, config)
        cache = KVCache(3)
        streams.forward(mx.array(PREFIX), cache)
        cache.advance(len(PREFIX))
        verified = StreamDrafter(streams, inline=True).verify(tree(), cache)
        assert verified.last.dtype == dtype
        assert verified.streams is not None
        assert verified.streams.dtype == dtype
        assert all(array.dtype == dtype for array in cache.arrays)
        exact = Reference(model, config, streams.tensors).run(PREFIX, TOKENS, PARENTS)[0]
        error = np.abs(np.array(verified.last[0].astype(mx.float32)) - exact).max()
        assert error < (0.05 if dtype == mx.float16 else 0.4)
    finally:
        small_model.cache_clear()


def test_pass_mask_is_the_drawing_of_the_docstring() -> None:
    seen = mx.array([[True, False], [True, True]])
    lossless = np.array(pass_mask(seen, 2, 3, main_sees_streams=False)).astype(int)
    shared = np.array(pass_mask(seen, 2, 3, main_sees_streams=True)).astype(int)
    local = np.array(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 0, 1, 0, 0, 0],
            [1, 0, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 0],
            [1, 1, 0, 0, 1, 1],
        ]
    )
    assert (lossless[:, :3] == 1).all()
    np.testing.assert_array_equal(lossless[:, 3:], local)
    local[0, 2:4] = local[1, 4:6] = 1
    np.testing.assert_array_equal(shared[:, 3:], local)
    assert pass_mask(seen, 0, 2, main_sees_streams=False).tolist() == [
        [True, True, True, False],
        [True, True, True, True],
    ]


def test_pass_mask_with_streams_at_some_nodes_leaves_out_the_others() -> None:
    seen = mx.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=mx.bool_)
    every = np.array(pass_mask(seen, 2, 4, main_sees_streams=False))
    kept = [0, 1, 2, 3, *range(4, 7), 9, 10, 11, 12]  # committed, main, streams of nodes 1 and 2
    nodes = mx.array([1, 2], dtype=mx.int32)
    few = pass_mask(seen, 2, 4, main_sees_streams=False, nodes=nodes)
    rows = [i - 4 for i in kept[4:]]
    np.testing.assert_array_equal(np.array(few), every[np.ix_(rows, kept)])


def test_rotation_of_values_is_a_complex_product() -> None:
    values = mx.random.normal((1, 2, 3, 6), key=mx.random.key(1))
    angles = mx.array([0.0, 0.5, -2.0])
    v = np.array(values)
    turned = (v[..., 0::2] + 1j * v[..., 1::2]) * np.exp(1j * np.array(angles))[:, None]
    found = np.array(rotate_values(values, angles))
    np.testing.assert_allclose(found[..., 0::2], turned.real, atol=1e-6)
    np.testing.assert_allclose(found[..., 1::2], turned.imag, atol=1e-6)
    np.testing.assert_array_equal(found[:, :, 0], v[:, :, 0])


def test_shared_adapters_may_be_missing_below() -> None:
    """Merged into the base on conversion: then only the MSA layers hold adapters."""
    model = small_model(layers=3)
    backbone, config = Backbone(model), stream_config(mode="shared")
    tensors = random_tensors(backbone, config)
    upper = {n: t for n, t in tensors.items() if not n.startswith("layers.0.")}
    zeros = {n: mx.zeros_like(t) if n.startswith("layers.0.") else t for n, t in tensors.items()}
    found = verify(Streams(backbone, config, upper), PREFIX, inline=True)
    wanted = verify(Streams(backbone, config, zeros), PREFIX, inline=True)
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)


@pytest.mark.parametrize(
    ("config", "missing", "says"),
    [
        ({"num_msa_layers": 4}, "", "4 MSA layers"),
        ({"num_msa_layers": 7}, "", "7 MSA layers"),
        ({"target_modules": ("self_attn.w_proj",)}, "", "self_attn.w_proj"),
        ({"target_modules": ("attention.q_proj",)}, "", "attention.q_proj"),
        ({}, "stream_embeddings", "stream_embeddings"),
        ({}, "layers.2.mlp.up_proj.lora_a", "layers.2.mlp.up_proj.lora_a"),
        ({}, "layers.1.mlp.up_proj.lora_b", "layers.1.mlp.up_proj.lora_b"),
        ({}, "stream_init.lora_a", "stream_init.lora_a"),
    ],
)
def test_streams_that_do_not_fit_are_refused(
    config: dict[str, object], missing: str, says: str
) -> None:
    backbone = Backbone(small_model(layers=3))
    tensors = random_tensors(backbone, stream_config())
    tensors.pop(missing, None)
    with pytest.raises(StreamsError, match=says.replace(".", r"\.")) as caught:
        Streams(backbone, stream_config(**config), tensors)
    assert "\n" not in str(caught.value)


def test_the_users_model_stays_untouched() -> None:
    model = small_model(layers=3)
    before = model(mx.array([PREFIX]))
    names = [name for name, _ in model.named_modules()]
    for mode in ("lossless", "shared"):
        verify(random_streams(model, stream_config(mode=mode), scale=50), PREFIX, inline=True)
    assert [name for name, _ in model.named_modules()] == names
    assert mx.array_equal(model(mx.array([PREFIX])), before)
