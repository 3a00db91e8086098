"""What an adoption will take: a trial of distilling and of training, and the minutes shared out.

    | plan: a trial | answers |            training            | measuring |

Answers and training share what measuring leaves so that training meets every answered position
about once: answers end when there are as many tokens as the rest of the time can train on. Training
ends by the clock. So a machine that slows down learns less, it does not take longer.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ...batch.generation import batch_generate
from ...doctor.sizes import usable_bytes
from ...errors import DataError, OutputError
from ...loading.load import StreamModel
from ...machine import Machine
from ...model.cache import GROWTH, KVCache
from ...train.awake import awake_s
from ...train.batches import select
from ...train.data import Example
from ...train.distilled import PromptToAnswer
from ...train.estimate import check_memory, memory_bytes
from ...train.options import TrainOptions
from ..train import make_objective, make_task

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ...weights.checkpoint import StreamWeights

LONGEST_PROMPT, ANSWER_TOKENS = 512, 128
USUAL_ANSWER = 96  # tokens, as many answers end before their room is used up
ENOUGH = 24  # answers, below which there is nothing to train on
MEASURE_SHARE, MEASURE_S = 0.15, 300.0
MOST_ANSWERING = 0.5  # of what measuring leaves
UPDATES = 150  # that a run should have at least, if need be with smaller batches
BATCH_SIZES = (1, 8)
ANSWER_BATCHES = (8, 64)
MEMORY_SHARE = 0.8  # of what a model may take, for it and the answers side by side
TRIAL_PROMPTS, TRIAL_TOKENS, TRIAL_BATCH = 16, 24, 2
CHECKPOINT_S = 20.0
WARMUP_SHARE, WARMUP = 0.08, 20  # of the updates, and at most so many
NEXT_TOKEN_RANK, PRUNER_RANK = 64, 8


@dataclass(frozen=True)
class Rates:
    """What a trial found: answer tokens and trained positions a second, memory, parameters.

    side_by_side: how many answers the memory has room for at a time.
    """

    answers_s: float
    positions_s: float
    needed_bytes: int
    parameters: int
    side_by_side: int


@dataclass(frozen=True)
class AdoptionPlan:
    """How the time is used. Seconds of each part, texts side by side, updates of the rate's warm-up."""

    answer_s: float
    train_s: float
    measure_s: float
    answer_batch: int
    train_batch: int
    save_every: int
    warmup: int
    rates: Rates

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> AdoptionPlan:
        return cls(**{**fields, "rates": Rates(**fields["rates"])})

    def lines(self) -> list[str]:
        """Return what a person is told before it begins."""
        answers = self.rates.answers_s * self.answer_s / USUAL_ANSWER
        total_s = self.answer_s + self.train_s + self.measure_s
        return [
            f"It takes {_minutes(total_s)} here: about {_minutes(self.answer_s)} for some "
            f"{max(1, round(answers)):,} answers of the model itself, {_minutes(self.train_s)} to "
            f"train {self.rates.parameters:,} parameters on them, {_minutes(self.measure_s)} to measure.",
            f"It needs about {self.rates.needed_bytes / 1e9:.1f} GB of memory and "
            f"{self.disk_bytes / 1e6:.0f} MB of disk. Stop it whenever you like; the same command "
            "goes on.",
        ]

    @property
    def disk_bytes(self) -> int:
        """Return what is on the disk at most: answers, the run's state and two sets of streams."""
        tokens = self.rates.answers_s * self.answer_s
        return int(24 * self.rates.parameters + 16 * tokens + 20e6)


def train_options(
    model: StreamModel, mode: str, *, further: bool = False, **fields: Any
) -> TrainOptions:
    """Return how streams are trained: as the shipped chat streams were.

    further: on top of given streams, whose shape stays, with half the rate.
    """
    lossless = mode == "lossless"
    rank = min(NEXT_TOKEN_RANK, model.backbone.hidden_size)
    return TrainOptions(
        mode=mode,  # type: ignore[arg-type]
        conditioner_tokens=2,
        next_token_rank=rank if lossless else 0,
        pruner_rank=PRUNER_RANK if lossless else 0,
        learning_rate=1e-3 if further else 2e-3,
        position_fraction=1.0,  # the base runs over a whole text for any share of its positions
        verdict_prompts=0,
        **fields,
    )


def try_out(
    model: StreamModel,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[PromptToAnswer],
    mode: str,
    folder: Path,
    given: StreamWeights | None = None,
) -> Rates:
    """Answer a few prompts and train on the answers once, without effect, and say how fast it went.

    given: streams that are to be trained further.

    Raises:
        DataError: no prompt fits into the model's context.
        ModelError: streams cannot be trained for this model.
        OptionError: the training does not fit into memory, or what is given cannot be trained so.
    """
    chosen = sorted(prompts[:TRIAL_PROMPTS], key=lambda p: len(p.tokens))
    if not chosen:
        raise DataError("none of the prompts fits into the model's context; give shorter ones.")
    mx.reset_peak_memory()
    started = awake_s()
    response = batch_generate(
        model,
        tokenizer,
        [prompt.tokens for prompt in chosen],
        TRIAL_TOKENS,
        speculative=False,
        completion_batch_size=len(chosen),
    )
    answered_s = awake_s() - started
    answers_s = max(1, response.stats.generation_tokens) / answered_s
    texts = [
        Example((*p.tokens, *answer), max(2, len(p.tokens)))
        for p, answer in zip(chosen, response.token_ids, strict=True)
    ]
    texts = [text for text in texts if len(text.positions) > 1][-TRIAL_BATCH:]
    if not texts:
        raise DataError("the model ends every answer at once; there is nothing to learn from it.")
    options = train_options(model, mode, batch_size=len(texts))
    task = make_task(
        model, tokenizer, options, texts, [], folder=folder, base_name=None, given=given
    )
    objective = make_objective(task)
    usual = [select(_as_long(text, USUAL_ANSWER), 1.0, (0,)) for text in texts]
    longest = [select(_as_long(text, ANSWER_TOKENS), 1.0, (0,)) for text in texts]
    needed = memory_bytes(model.backbone, task.config, task.start, options, longest)
    check_memory(needed)
    for batch in ([select(texts[0], 1.0, (0,))], usual):  # the first pays for what is done once
        weights, head = objective.weights([batch]), objective.head(batch, 0)
        started = awake_s()
        objective.gradients(task.start, batch, weights, head)
        taken = awake_s() - started
    positions = sum(len(selection.positions) for selection in usual)
    parameters = sum(tensor.size for tensor in task.start.values())
    needed = max(mx.get_peak_memory(), needed)
    return Rates(answers_s, positions / taken, needed, parameters, _side_by_side(model, needed))


def _side_by_side(model: StreamModel, used: int) -> int:
    """Return how many answers fit into the memory beside what else takes `used` bytes of it."""
    cache = KVCache(model.backbone.num_layers)
    mx.eval(model.backbone.forward(mx.array([0]), cache), cache.arrays)
    columns = -(-(LONGEST_PROMPT + ANSWER_TOKENS) // GROWTH)
    # Twice, because buffers that grow are copied.
    each = 2 * columns * cache.nbytes
    have = MEMORY_SHARE * usable_bytes(Machine.read())
    return max(1, int((have - used) // each)) if have else ANSWER_BATCHES[0]


def share_out(rates: Rates, seconds: float, known_tokens: int = 0) -> AdoptionPlan:
    """Share out the seconds that are left after the trial.

    known_tokens: of answers that are there already.
    """
    measure_s = min(MEASURE_SHARE * seconds, MEASURE_S)
    work_s = seconds - measure_s
    # answers_s * answer_s + known = positions_s * train_s
    both = rates.answers_s + rates.positions_s
    wanted = (rates.positions_s * work_s - known_tokens) / both
    answer_s = min(max(wanted, 0.0), MOST_ANSWERING * work_s)
    train_s = work_s - answer_s
    if not known_tokens:  # however few the minutes are
        answer_s = max(answer_s, ENOUGH * USUAL_ANSWER / rates.answers_s)
    low, high = ANSWER_BATCHES
    # Three answers after each other at least, or those cut short at the end were most of them.
    side_by_side = max(low, int(rates.answers_s * answer_s / (3 * ANSWER_TOKENS)))
    texts = rates.positions_s * train_s / UPDATES / USUAL_ANSWER
    batch = int(min(max(texts, BATCH_SIZES[0]), BATCH_SIZES[1]))
    update_s = batch * USUAL_ANSWER / rates.positions_s
    return AdoptionPlan(
        answer_s,
        train_s,
        measure_s,
        min(side_by_side, high, rates.side_by_side),
        batch,
        max(1, round(CHECKPOINT_S / update_s)),
        round(min(max(WARMUP_SHARE * train_s / update_s, 1), WARMUP)),
        rates,
    )


def check_disk(plan: AdoptionPlan, folder: Path) -> None:
    """Refuse what the disk has no room for.

    Raises:
        OutputError: with how much is missing.
    """
    free = shutil.disk_usage(folder).free
    if free < plan.disk_bytes:
        raise OutputError(
            f"this takes {plan.disk_bytes / 1e6:.0f} MB of disk and {folder} has {free / 1e6:.0f} MB "
            "free; free some space or name another place in SPECSTREAM_CACHE."
        )


def _as_long(text: Example, num_tokens: int) -> Example:
    """Return a text as long as an answer of so many tokens makes it."""
    more = num_tokens - len(text.answer)
    return Example((*text.tokens, *text.tokens[-1:] * more), text.prompt_length)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
