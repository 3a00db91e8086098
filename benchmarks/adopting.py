"""What adopting a model takes: tokens a second of distilling, positions a second of training.

    python -m benchmarks.adopting --model demo --batch 8 32 64
    python -m benchmarks.adopting --predict Qwen3-4B --bits 4 --chip "M4 Pro" --tflops 5.5

Rates are given for the process's CPU time as well, for a machine that others keep busy. `--predict`
counts operations and bytes of a model and chip that are not here: a prediction, not a measurement.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlx_specstream.commands.adoption.plan import (
    ANSWER_TOKENS,
    LONGEST_PROMPT,
    USUAL_ANSWER,
    train_options,
)
from mlx_specstream.commands.adoption.prompts import records_for
from mlx_specstream.commands.distill import answer_prompts, read_prompts
from mlx_specstream.commands.train import make_objective, make_task, read_data
from mlx_specstream.doctor.sizes import TYPICAL, Shape
from mlx_specstream.loading.load import load
from mlx_specstream.planner.prior import EFFICIENCY, Chip, chip_named
from mlx_specstream.train.trainer import Trainer

PROMPT_TOKENS = 54  # of the built-in prompts, on average


@dataclass
class Work:
    """What a block took: seconds on the clock and of the process's CPU time."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def told(self, count: int, unit: str) -> str:
        return (
            f"{count:,} {unit}: {count / self.wall_s:.1f} a second, {count / self.cpu_s:.1f} a second of "
            f"CPU time ({self.wall_s:.0f} s, {self.cpu_s:.0f} s of CPU time)"
        )


@contextmanager
def timed() -> Iterator[Work]:
    """Time a block."""
    work, wall, cpu = Work(), time.perf_counter(), time.process_time()
    yield work
    work.wall_s, work.cpu_s = time.perf_counter() - wall, time.process_time() - cpu


@dataclass(frozen=True)
class Counted:
    """Operations of one distilled token and of one trained position."""

    answer: float
    position: float


def counted(shape: Shape, *, streams: int = 4, vocabulary: int = 0) -> Counted:
    """Count what the products of an answer's token and of a trained position take.

    A product costs two operations a weight and row; where stream rows are differentiated, twice
    that, for frozen weights have no gradient of their own. Adapters and attention are left out.
    vocabulary: tokens that a training step's head knows, 0 for all.
    """
    head = shape.vocab * shape.hidden
    layers = shape.num_params - head * (1 if shape.tied else 2)
    upper = layers * max(1, round(0.4 * shape.layers)) / shape.layers
    texts = (PROMPT_TOKENS + USUAL_ANSWER) / USUAL_ANSWER
    known = (vocabulary or shape.vocab) * shape.hidden
    # The head is met twice, with and without the conditioner, and once by the pruner.
    position = 2 * layers * texts + 4 * streams * upper + (8 * streams + 4) * known
    return Counted(2 * (layers * texts + head), position)


def predicted(shape: Shape, bits: int, chip: Chip, flops: float, batch: int) -> str:
    """Say what adopting should take on a chip that is not here.

    flops: operations a second that its matrix products reach.
    """
    each = counted(shape)
    read_s = shape.weight_bytes(bits) / (EFFICIENCY * chip.bandwidth)
    answers_s = batch / max(read_s, batch * each.answer / flops)
    positions_s = flops / each.position
    lines = [
        f"Predicted, not measured: {shape.name} in {bits} bits on {chip.name} at {flops / 1e12:g} TFLOPS.",
        f"{each.answer / 1e9:.1f} GFLOP a token answered, {each.position / 1e9:.1f} GFLOP a position trained.",
        f"{answers_s:.0f} tokens a second answered ({batch} side by side), {positions_s:.0f} positions "
        "a second trained.",
    ]
    for positions in (20_000, 65_000, 250_000):
        minutes = (positions / answers_s + positions / positions_s) / 60
        lines.append(f"{positions:,} positions: {minutes:.0f} minutes, measuring left out.")
    return "\n".join(lines)


def measured(name: str, batches: Sequence[int], tokens: int, updates: int) -> Iterator[str]:
    """Distil with so many answers side by side each time, then train on the last answers."""
    model, tokenizer = load(name, streams=None)
    prompts = read_prompts(records_for(None, []), tokenizer, LONGEST_PROMPT)[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "none.jsonl"
        for batch in batches:
            path = Path(folder) / f"{batch}.jsonl"
            made = 0

            def is_over(so_far: int) -> bool:
                nonlocal made
                made = so_far
                return so_far >= tokens

            with timed() as work:
                answer_prompts(
                    model,
                    tokenizer,
                    prompts,
                    path,
                    max_tokens=ANSWER_TOKENS,
                    batch_size=batch,
                    is_over=is_over,
                )
            yield f"distilling, {batch} side by side: {work.told(made, 'tokens')}"
        options = train_options(model, "lossless", held_out=0, batch_size=1, iters=updates)
        texts, _ = read_data(str(path), tokenizer, model, options, talk=False)
        run = Path(folder) / "run"
        task = make_task(
            model, tokenizer, options, texts, [], folder=run, base_name=None, say=lambda _: None
        )
        trainer = Trainer(task, make_objective(task))
        trained = 0
        with timed() as work:
            for update in range(updates):
                trained += sum(len(s.positions) for s in trainer.plan.batch(update))
                trainer.make_update()
        yield f"training, a text an update: {work.told(trained, 'positions')}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--tokens", type=int, default=3000, help="to distil (%(default)s)")
    parser.add_argument("--updates", type=int, default=10, help="to train (%(default)s)")
    parser.add_argument("--predict", choices=[shape.name for shape in TYPICAL])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--chip", default="M4 Pro")
    parser.add_argument("--tflops", type=float, default=5.5)
    args = parser.parse_args(argv)
    if args.predict:
        shape = next(shape for shape in TYPICAL if shape.name == args.predict)
        if (chip := chip_named(args.chip)) is None:
            parser.error(f"no figures are known for the chip {args.chip!r}")
        print(predicted(shape, args.bits, chip, args.tflops * 1e12, 64))
        return 0
    for line in measured(args.model, args.batch, args.tokens, args.updates):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
