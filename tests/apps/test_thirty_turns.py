"""Thirty turns with edits, retries and interruptions leave a fresh prefill's cache, and no more."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_specstream.apps.chat.session import ChatSession
from mlx_specstream.apps.chat.settings import Settings
from tests.apps.thirty_turns import TURNS, chatting, compared, faults
from tests.support.scripted import with_streams

TREE = Settings(max_tokens=12).changed("tree", "8")


@pytest.fixture
def session(tiny_llama: nn.Module, byte_tokenizer: TokenizerWrapper) -> ChatSession:
    return ChatSession(with_streams(tiny_llama), byte_tokenizer, TREE)


@pytest.mark.slow
def test_the_cache_is_a_fresh_prefills_and_memory_is_flat(session: ChatSession) -> None:
    turns = list(chatting(session))
    assert len(turns) == TURNS
    assert faults(turns) == []
    assert max(turn.difference for turn in turns) < 1e-4
    kinds = {turn.what for turn in turns}
    assert {"ask", "ask, stopped", "retry", "retry, stopped", "edit", "edit, stopped"} >= kinds
    assert {"ask", "ask, stopped", "retry", "edit"} <= kinds
    assert session.conversation.forgotten > 0, "the context of 512 was full at some point"
    assert sum(turn.computed < turn.prompt for turn in turns) > 20, "rows were used again"
    held = [turn.held_bytes for turn in turns[5:]]
    assert max(held) - min(held) < 100_000, "nothing is held but the cache"


def test_a_spoilt_row_or_a_kept_array_would_be_seen(session: ChatSession) -> None:
    turns = list(chatting(session, 6))
    assert faults(turns) == []
    layer = session.prefix.kv.layers[1]
    assert layer.keys is not None
    layer.keys[:, :, 5] += 3.0
    spoilt = compared(session, 7, "spoilt")
    assert spoilt.difference > 0.1
    assert faults([*turns, spoilt])[0] == "turn 7 left other rows"
    kept = mx.zeros(2**20)
    mx.eval(kept)
    grown = replace(compared(session, 8, "kept"), difference=0.0, same=True)
    assert grown.held_bytes >= turns[-1].held_bytes + 0.99 * kept.nbytes
    assert "memory grew" in faults([*turns, grown])[0]
