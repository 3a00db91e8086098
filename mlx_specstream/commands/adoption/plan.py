"""What an adoption will take: a trial of distilling and of training, and the minutes shared out.

    | plan: a trial | answers |            training            | measuring |

Answers and training share what measuring leaves so that training meets every answered position
about once. Both end by the clock, so a machine that slows down gives fewer answers, not a longer run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ...batch.generation import batch_generate
from ...errors import DataError, OutputError
from ...loading.load import StreamModel
from ...train.batches import select
from ...train.data import Example
from ...train.distilled import PromptToAnswer
from ...train.estimate import check_memory, memory_bytes
from ...train.options import TrainOptions
from ..train import make_objective, make_task

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

ANSWER_TOKENS = 128
MEASURE_SHARE, MEASURE_S = 0.15, 300.0
ANSWER_SHARES = (0.1, 0.5)  # of what measuring leaves
UPDATES = 150  # that a run should have at least, if need be with smaller batches
BATCH_SIZES = (2, 8)
ANSWER_BATCHES = (8, 32)
TRIAL_PROMPTS, TRIAL_TOKENS, TRIAL_BATCH = 16, 24, 4
CHECKPOINT_S = 20.0
NEXT_TOKEN_RANK, PRUNER_RANK = 64, 8


@dataclass(frozen=True)
class Rates:
    """What a trial found: answer tokens and trained positions a second, memory, parameters."""

    answers_s: float
    positions_s: float
    peak_bytes: int
    needed_bytes: int
    parameters: int


@dataclass(frozen=True)
class AdoptionPlan:
    """How the time is used. Seconds of each part, tokens of an answer, texts side by side."""

    answer_s: float
    train_s: float
    measure_s: float
    answer_batch: int
    train_batch: int
    save_every: int
    rates: Rates

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> AdoptionPlan:
        return cls(**{**fields, "rates": Rates(**fields["rates"])})

    def lines(self, minutes: float) -> list[str]:
        """Return what a person is told before it begins."""
        answers = self.rates.answers_s * self.answer_s / ANSWER_TOKENS
        return [
            f"It takes {minutes:g} minutes here: about {_minutes(self.answer_s)} for some "
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
        held_out=32,
        steps_per_eval=0,
        verdict_prompts=0,  # what was gained is measured afterwards, once
        **fields,
    )


def try_out(
    model: StreamModel,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[PromptToAnswer],
    mode: str,
    folder: Path,
) -> Rates:
    """Answer a few prompts and train on the answers once, without effect, and say how fast it went.

    Raises:
        DataError: no prompt fits into the model's context.
        ModelError: streams cannot be trained for this model.
        OptionError: the training does not fit into memory.
    """
    chosen = sorted(prompts[:TRIAL_PROMPTS], key=lambda p: len(p.tokens))
    if not chosen:
        raise DataError("none of the prompts fits into the model's context; give shorter ones.")
    mx.reset_peak_memory()
    started = time.perf_counter()
    response = batch_generate(
        model,
        tokenizer,
        [prompt.tokens for prompt in chosen],
        TRIAL_TOKENS,
        speculative=False,
        completion_batch_size=len(chosen),
    )
    answered_s = time.perf_counter() - started
    answers_s = max(1, response.stats.generation_tokens) / answered_s
    texts = [
        Example((*p.tokens, *answer), max(2, len(p.tokens)))
        for p, answer in zip(chosen, response.token_ids, strict=True)
    ]
    texts = [text for text in texts if len(text.positions) > 1][-TRIAL_BATCH:]
    if not texts:
        raise DataError("the model ends every answer at once; there is nothing to learn from it.")
    options = train_options(model, mode, batch_size=len(texts))
    task = make_task(model, tokenizer, options, texts, [], folder=folder, base_name=None)
    objective = make_objective(task)
    batch = [select(text, options.position_fraction, (0, i)) for i, text in enumerate(texts)]
    longest = [select(_as_long(text), options.position_fraction, (0,)) for text in texts]
    needed = memory_bytes(model.backbone, task.config, task.start, options, longest)
    check_memory(needed)
    weights, head = objective.weights([batch]), objective.head(batch, 0)
    taken = []
    for _ in range(2):  # the first pays for what is done once
        started = time.perf_counter()
        objective.gradients(task.start, batch, weights, head)
        taken.append(time.perf_counter() - started)
    positions = sum(len(selection.positions) for selection in batch)
    peak = mx.get_peak_memory()
    parameters = sum(tensor.size for tensor in task.start.values())
    return Rates(answers_s, positions / min(taken), peak, max(peak, needed), parameters)


def share_out(rates: Rates, seconds: float, known_tokens: int = 0) -> AdoptionPlan:
    """Share out the seconds that are left after the trial.

    known_tokens: of answers that are there already.
    """
    measure_s = min(MEASURE_SHARE * seconds, MEASURE_S)
    work_s = seconds - measure_s
    # answers_s * answer_s + known = positions_s * train_s
    both = rates.answers_s + rates.positions_s
    wanted = (rates.positions_s * work_s - known_tokens) / both / work_s
    low, high = ANSWER_SHARES if not known_tokens else (0.0, ANSWER_SHARES[1])
    answer_s = work_s * min(max(wanted, low), high)
    train_s = work_s - answer_s
    side_by_side = int(rates.answers_s * answer_s / (3 * ANSWER_TOKENS))
    texts = rates.positions_s * train_s / UPDATES / (ANSWER_TOKENS / 2)
    batch = int(min(max(texts, BATCH_SIZES[0]), BATCH_SIZES[1]))
    update_s = batch * ANSWER_TOKENS / 2 / rates.positions_s
    return AdoptionPlan(
        answer_s,
        train_s,
        measure_s,
        min(max(side_by_side, ANSWER_BATCHES[0]), ANSWER_BATCHES[1]),
        batch,
        max(1, round(CHECKPOINT_S / update_s)),
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


def _as_long(text: Example) -> Example:
    """Return a text as long as a whole answer makes it."""
    more = ANSWER_TOKENS - len(text.answer)
    return Example((*text.tokens, *text.tokens[-1:] * more), text.prompt_length)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
