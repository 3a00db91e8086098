"""The reference against `transformers` itself and against a slow loop over single rows."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mlx_specstream.convert.pytorch.adapters import grow  # noqa: E402
from mlx_specstream.convert.pytorch.model import SpeculativeModel, rotate_values  # noqa: E402
from mlx_specstream.convert.pytorch.states import compute_states  # noqa: E402

IDS = [5, 17, 3, 44, 60, 9, 71, 23, 12]


def lora(adapters, layer, name, x):
    delta = adapters.delta(layer, name)
    return 0 if delta is None else delta.scale * (x @ delta.lora_A.weight.T) @ delta.lora_B.weight.T


def slow_streams(backbone, adapters, ids, t):
    """Stream states of position t, one row at a time in order of level: plain loops, HF modules, no masks."""
    G, shared = adapters.config.num_streams, adapters.config.mode == "shared"
    assert not shared, "the slow loop knows lossless mode only"
    with torch.no_grad():
        out = backbone.model.model(torch.tensor([ids]), output_hidden_states=True, use_cache=True)
    main = out.hidden_states[adapters.first_msa_layer][0, t]
    if adapters.next_token is not None:
        row = backbone.embed(torch.tensor(ids[t + 1]))
        a, b = (m.weight for m in (adapters.next_token.lora_A, adapters.next_token.lora_B))
        main = main + b @ (a @ (row / row.square().mean().add(1e-6).sqrt()))
    rows = [main + adapters.stream_embeddings[j] for j in range(G)]
    for index in range(adapters.first_msa_layer, len(backbone.layers)):
        layer, seen = backbone.layers[index], []
        window = backbone.window(index)
        cached = out.past_key_values.layers[index]
        new = []
        for j, x in enumerate(rows):
            position = torch.tensor([[t + j + 1]])
            q, k, v = layer.queries_keys_values(
                x[None, None],
                backbone.rotation(position),
                lambda n, m, y, i=index: m(y) + lora(adapters, i, n, y),
            )
            if adapters.config.value_rotation:
                v = rotate_values(v, torch.tensor([adapters.config.value_rotation * (j + 1)]))
            seen.append((k[0, :, 0], v[0, :, 0]))
            first = 0 if window is None else max(0, t + j + 1 - window + 1)
            keys, values = (
                full_keys(backbone, ids, index) if window else (cached.keys[0], cached.values[0])
            )
            keys = torch.cat([keys[:, first : t + 1], torch.stack([s[0] for s in seen], 1)], 1)
            values = torch.cat([values[:, first : t + 1], torch.stack([s[1] for s in seen], 1)], 1)
            heads = []
            for head in range(layer.num_heads):
                group = head // (layer.num_heads // layer.num_kv_heads)
                weights = torch.softmax(keys[group] @ q[0, head, 0] * layer.scale, 0)
                heads.append(weights @ values[group])
            attended = torch.cat(heads)[None, None]
            new.append(
                layer.finish(
                    x[None, None], attended, lambda n, m, y, i=index: m(y) + lora(adapters, i, n, y)
                )[0, 0]
            )
        rows = new
    return backbone.norm(torch.stack(rows))


def full_keys(backbone, ids, index):
    """Main keys and values of one layer, without the cache's sliding cut."""
    states = compute_states(backbone, ids[:1], [*ids[1:], 0], len(backbone.layers) - index)
    return states.keys[0], states.values[0]


def test_main_rows_are_the_base_model(family, make_backbone, make_adapters):
    backbone = make_backbone(family)
    model = SpeculativeModel(backbone, make_adapters(backbone))
    with torch.no_grad():
        expected = backbone.model(torch.tensor([IDS])).logits
        actual = backbone.head(model.forward(torch.tensor([IDS])).main)
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"value_rotation": 0.2}, {"next_token_rank": 3}], ids=str)
def test_streams_match_the_slow_loop(family, changes, make_backbone, make_adapters):
    backbone = make_backbone(family)
    adapters = make_adapters(backbone, **changes)
    with torch.no_grad():
        streams = (
            SpeculativeModel(backbone, adapters)
            .forward(torch.tensor([IDS]), torch.tensor([2, 7]), following=torch.tensor([[44, 12]]))
            .streams
        )
        for row, t in enumerate((2, 7)):
            expected = slow_streams(backbone, adapters, IDS, t)
            torch.testing.assert_close(streams[0, row], expected, atol=2e-4, rtol=1e-4)


def test_rope_offset_moves_the_streams(make_backbone, make_adapters):
    backbone = make_backbone()
    assert make_adapters(backbone).positions(torch.tensor([4])).tolist() == [[5, 6, 7]]
    assert make_adapters(backbone, rope_offset="position").positions(
        torch.tensor([4])
    ).tolist() == [[4, 4, 4]]


def test_shared_mode_lets_main_see_its_own_streams_only(make_backbone, make_adapters):
    backbone = make_backbone()
    model = SpeculativeModel(backbone, make_adapters(backbone, mode="shared"))
    with torch.no_grad():
        none = model.forward(torch.tensor([IDS]), torch.tensor([], dtype=torch.long)).main
        some = model.forward(torch.tensor([IDS]), torch.tensor([4])).main
    changed = (none - some).abs().amax(-1)[0]
    assert changed[:4].max() < 1e-5
    assert changed[4] > 1e-3
    assert changed[5:].max() > 1e-3  # later rows read the changed keys of row 4


def test_a_tree_is_verified_like_each_of_its_paths(make_backbone, make_adapters):
    backbone = make_backbone()
    model = SpeculativeModel(backbone, make_adapters(backbone))
    prefix, tree, parents = IDS[:4], [7, 8, 9, 10], [-1, 0, 0, 2]
    L = len(prefix) + len(tree)
    mask = torch.ones(L, L, dtype=torch.bool).tril()
    mask[len(prefix) :, len(prefix) :] = torch.eye(len(tree), dtype=torch.bool)
    depth = [0, 1, 1, 2]
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[len(prefix) + node] |= mask[len(prefix) + parent]
    positions = torch.tensor([[*range(len(prefix)), *(len(prefix) + d for d in depth)]])
    with torch.no_grad():
        out = model.forward(
            torch.tensor([prefix + tree]), torch.tensor([L - 1]), positions, mask[None]
        )
        path = model.forward(torch.tensor([[*prefix, 7, 9, 10]]), torch.tensor([6]))
    torch.testing.assert_close(out.main[0, -1], path.main[0, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.streams, path.streams, atol=1e-4, rtol=1e-4)


def test_parts_added_to_trained_streams_change_nothing_yet(make_backbone, make_adapters):
    backbone = make_backbone()
    before = make_adapters(backbone, conditioner_rank=4, conditioner_hidden=8)
    grown = grow(before, backbone, next_token_rank=3, conditioner_tokens=2)
    ids, hidden = torch.tensor([IDS]), torch.randn(5, 48)
    rows = [backbone.embed(torch.arange(first, first + 5)) for first in (3, 60)]
    with torch.no_grad():
        known = (
            SpeculativeModel(backbone, grown).forward(ids, following=torch.tensor([IDS])).streams
        )
        torch.testing.assert_close(known, SpeculativeModel(backbone, before).forward(ids).streams)
        corrected = grown.conditioner(rows[0], hidden, rows[1])
        torch.testing.assert_close(corrected, before.conditioner(rows[0], hidden))
