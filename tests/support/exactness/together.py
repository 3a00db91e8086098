"""A turn of a case in a batch: beside other requests, which come at any time, and once more as a twin.

The others have texts of their own, half of which quote themselves, so that look-up finds something. The
twin reads the whole text anew. Both the answer and the twin's must be mlx-lm's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_specstream.batch import BatchDecoder, BatchGovernor, BatchSequence
from mlx_specstream.batch.check import check_model
from mlx_specstream.errors import ModelError
from mlx_specstream.loading.load import StreamModel
from mlx_specstream.model.cache import KVCache
from mlx_specstream.speculation.drafters.lookup import Continuations
from mlx_specstream.speculation.result import MaxTokens, StepResult
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.streams import Streams
from tests.support.batched import with_batch_table
from tests.support.exactness.choices import processors_for
from tests.support.exactness.draw import Case


class Answer:
    """Collects an answer's tokens, the logits of each, and how many drafts were accepted."""

    def __init__(self, length: int) -> None:
        self.tokens: list[int] = []
        self.logits: list[mx.array] = []
        self.accepted = 0
        self.criteria = MaxTokens(length)

    def should_continue(self, result: StepResult) -> bool:
        self.tokens += result.tokens
        self.logits += list(result.logits)
        self.accepted += result.accepted
        return self.criteria.should_continue(result)


class BatchWhims(BatchGovernor):
    """Drafts or not at random, and verifies any number of rows of what was looked up."""

    def __init__(self, seed: int) -> None:
        super().__init__(clock=None)
        self.random = random.Random(seed)

    def speculates(self, requests: int) -> bool:
        del requests
        return self.random.random() < 0.6

    def rows(self, drafted: int, found: Sequence[Continuations]) -> int:
        del found
        rows = self.random.choice([0, 2, 3, 5, 9])
        return rows if rows > 1 + drafted else 0


def can_be_batched(streams: Streams) -> bool:
    """Tell whether requests to this model can share passes."""
    try:
        check_model(streams.backbone)
    except ModelError:
        return False
    return True


def answer_together(
    case: Case,
    streams: Streams,
    number: int,
    whole: Sequence[int],
    rest: Sequence[int],
    kv: KVCache,
    prompt: Sequence[int],
    length: int,
) -> tuple[Answer, Answer, KVCache]:
    """Decode a turn's answer in a batch; return it, its twin's, and the cache it leaves.

    whole: the text before the answer, of which `kv` holds all but `rest`. prompt: what processors
    are told of it.
    """
    scene, vocab = case.scene, streams.backbone.vocab_size
    rng = np.random.default_rng([scene.seed, case.number, number])
    model = StreamModel(
        streams.backbone.model, streams.backbone, None if case.drafts == "none" else streams
    )
    decode = replace(case.decode, prune=None, stream_nodes=0)
    if case.drafts == "none" and decode.tree.kind == "product":
        decode = replace(decode, tree=replace(decode.tree, kind="best", rows=7, depth=0))
    governor = BatchWhims(case.number) if case.drafts == "auto" else None
    decoder = BatchDecoder(model, decode, prefill_budget=max(2, scene.chunk), governor=governor)
    if case.drafts == "table":
        decoder = with_batch_table(decoder)
    answer, twin = Answer(length), Answer(length)
    processors = processors_for(scene, number, vocab)

    def join(text: Sequence[int], one: Answer, cache: KVCache | None, turn: int) -> BatchSequence:
        own = processors if turn == number else processors_for(scene, turn, vocab)
        told = list(prompt) if turn == number else list(text)
        sampler = TokenSampler(None, tuple(own), told)
        return decoder.add(text, cache=cache, token_sampler=sampler, criteria=one, text=whole)

    sequence = join(rest, answer, kv, number)
    others: list[BatchSequence] = []
    wanted = [(whole, twin, number)]
    for other in range(case.beside):
        said = rng.integers(0, vocab, int(rng.integers(1, 24))).tolist()
        if rng.random() < 0.5:
            said = [*said, *said[: len(said) // 2 + 1]]
        wanted.append((said, Answer(int(rng.integers(1, 20))), 10 + other))
    rng.shuffle(wanted)  # type: ignore[arg-type]
    while wanted or decoder.busy:
        if wanted and rng.random() < 0.6:
            text, one, turn = wanted.pop()
            others.append(join(text, one, None, turn))
        elif others and rng.random() < 0.05:
            gone = others.pop()
            if gone.criteria is twin:
                others.append(gone)
            else:
                decoder.remove(gone)
        for _, _, error in decoder.step():
            if error is not None:
                raise error
    return answer, twin, decoder.remove(sequence)
