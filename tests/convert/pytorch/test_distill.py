"""Batched self-distillation against plain decoding, one text at a time."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mlx_specstream.convert.pytorch.batched import PromptInSlot, answer, greedy  # noqa: E402
from mlx_specstream.convert.pytorch.states import (  # noqa: E402
    StateReader,
    StateShape,
    StateWriter,
    compute_states,
)
from mlx_specstream.errors import DataError  # noqa: E402
from mlx_specstream.train.distilled import answered  # noqa: E402

EOS = 2


def plain_answer(backbone, ids, max_new_tokens, eos):
    ids, start = list(ids), len(ids)
    with torch.no_grad():
        while len(ids) - start < max_new_tokens:
            ids.append(int(backbone.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in eos:
                break
    return ids[start:]


def prompts(count):
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    return [
        PromptInSlot(i, [], None, torch.randint(3, 97, (n,), generator=generator).tolist(), "p")
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_slots_refills_and_compaction_change_nothing(make_backbone, batch_size):
    backbone = make_backbone("llama")
    # Tokens that this model says often end an answer, so that slots finish at different times.
    eos = set(range(2, 24))
    found = {
        p.index: p.answer
        for p in answer(backbone, prompts(11), batch_size=batch_size, max_new_tokens=9, eos=eos)
    }
    expected = {p.index: plain_answer(backbone, p.tokens, 9, eos) for p in prompts(11)}
    assert found == expected
    assert len({len(a) for a in expected.values()}) > 2


def test_every_family(make_backbone, family):
    if family == "mistral":
        pytest.skip("texts beyond a sliding window are not distilled here")
    backbone = make_backbone(family)
    for p in answer(backbone, prompts(4), batch_size=4, max_new_tokens=5, eos={EOS}):
        assert p.answer == plain_answer(backbone, p.tokens, 5, {EOS})


def test_states_are_those_of_a_forward_pass(make_backbone, tmp_path):
    backbone = make_backbone()
    shape = StateShape(
        2, backbone.num_kv_heads, backbone.head_dim, backbone.hidden_size, "bfloat16"
    )
    writer = StateWriter(tmp_path / "states", shape)
    kept = {}
    for p in answer(
        backbone, prompts(5), batch_size=3, max_new_tokens=6, eos={EOS}, num_msa_layers=2
    ):
        expected = compute_states(backbone, p.tokens, p.answer, 2)
        for name in ("keys", "values", "hidden"):
            torch.testing.assert_close(
                getattr(p.states, name), getattr(expected, name), atol=1e-4, rtol=1e-4
            )
        kept[p.source, p.index] = p.states
        for name in ("keys", "values", "hidden"):
            setattr(p.states, name, getattr(p.states, name).bfloat16())
        writer.append((p.source, p.index), p.states)
    reader = StateReader(tmp_path / "states")
    for key, states in kept.items():
        assert key in reader
        for name in ("keys", "values", "hidden"):
            assert torch.equal(getattr(reader[key], name), getattr(states, name))
    other = StateWriter(tmp_path / "more", shape)
    other.append(("s", 99), kept[key])
    both = StateReader(tmp_path / "states", tmp_path / "more")
    assert torch.equal(both["s", 99].hidden, kept[key].hidden)
    assert torch.equal(both[key].values, kept[key].values)
    odd = StateWriter(tmp_path / "odd", StateShape(3, 1, 2, 3))
    odd.index.flush()
    with pytest.raises(DataError, match="different layers"):
        StateReader(tmp_path / "states", tmp_path / "odd")
    with pytest.raises(DataError, match="choose another file"):
        StateWriter(tmp_path / "states", StateShape(3, 1, 2, 3))


def test_close_logits_are_compared_in_float32(make_backbone):
    backbone = make_backbone()
    backbone.model.to(torch.bfloat16)
    hidden = torch.randn(40, 48, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = (hidden.float() @ backbone.head_weight.float().T).argmax(-1)
    assert torch.equal(greedy(backbone, hidden), exact)


def test_an_unfinished_line_is_cut_off(tmp_path):
    path = tmp_path / "out.jsonl"
    whole = json.dumps({"source": "a", "index": 3}) + "\n"
    path.write_text(whole + '{"source": "a", "ind', encoding="utf-8")
    assert answered(path) == {("a", 3)}
    assert path.read_text(encoding="utf-8") == whole
    assert answered(tmp_path / "absent.jsonl") == set()
