r"""Train streams, or a pruner for them, and write a schema-1 checkpoint.

    # 1. the model's own answers, and its states on the way
    python -m mlx_specstream.convert.pytorch.distill --model DIR --data prompts.jsonl --output own.jsonl --states own
    # 2. streams and parent conditioner, within a time budget; the learning rate has decayed when the time is up
    python -m mlx_specstream.convert.pytorch.train --model DIR --data own.jsonl --states own --output OUT \
        --num-streams 4 --num-msa-layers 12 --max-minutes 60

In lossless mode the base model is frozen and only stream rows are computed and differentiated; `--mode shared`
trains main and streams together (with few `--positions` on small machines), `--train pruner` the early exit alone
(with `--start-from`). What is minimised is in `objectives.py`.

The output is a schema-1 checkpoint plus `train_log.jsonl` and `train_args.json`. While training, `OUT.partial-train/`
holds the state that a second run with the same output continues from, exactly: adapters, optimizer, place in the data.
Without `--states` the base states are computed in every step.

Several processes share a step when started by

    torchrun --nproc-per-node 2 -m mlx_specstream.convert.pytorch.train ... --threads 1

which on a CPU whose cores others use too loses far less than threads that wait for each other.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mlx_specstream.config import StreamConfig
from mlx_specstream.convert.pytorch import workers
from mlx_specstream.convert.pytorch.adapters import StreamAdapters, grow
from mlx_specstream.convert.pytorch.backbone import Backbone
from mlx_specstream.convert.pytorch.checkpoint import load_checkpoint, save_checkpoint
from mlx_specstream.convert.pytorch.data import (
    Example,
    Selection,
    epoch_batches,
    read_examples,
    select,
    split_held_out,
)
from mlx_specstream.convert.pytorch.loss import VocabularySampler
from mlx_specstream.convert.pytorch.objectives import (
    Common,
    LosslessObjective,
    Objective,
    PrunerObjective,
    SharedObjective,
)
from mlx_specstream.convert.pytorch.states import StateReader, States, compute_states
from mlx_specstream.errors import OptionError, SpecStreamError
from mlx_specstream.files import atomic_file


@dataclass
class Progress:
    """Where a run stands; everything random is a function of this and the seed."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    elapsed_s: float = 0.0
    positions: int = 0


class Trainer:
    """One training run."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        if args.threads:
            torch.set_num_threads(args.threads)
        self.args = args
        self.output = Path(args.output)
        self.work = self.output.with_name(self.output.name + ".partial-train")
        self.work.mkdir(parents=True, exist_ok=True)
        self.backbone = Backbone.load(args.model, getattr(torch, args.dtype))
        self.adapters = self._adapters()
        self.optimizer = torch.optim.AdamW(
            self._groups(), betas=(0.9, args.beta2), weight_decay=0.0
        )
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.progress = Progress()
        self.reader = StateReader(args.states) if args.states else None
        self.train, self.held_out = self._texts()
        answers = (e.answer for e in self.train)
        sampler = VocabularySampler(
            self.backbone.vocab_size, answers, args.num_frequent, args.num_random
        )
        self.objective = self._objective(
            Common(self.backbone, self.adapters, sampler, self._states, args.alpha_decay)
        )
        self.state_file = self.work / "state.pt"
        if self.state_file.exists():
            self._resume()

    def _adapters(self) -> StreamAdapters:
        """Make new adapters, or take those of `--start-from` and give them what they lack."""
        args = self.args
        if args.start_from:
            adapters = load_checkpoint(args.start_from, self.backbone)
            wanted = {
                "num_streams": max(args.num_streams, adapters.config.num_streams),
                "mode": args.mode,
            }
            if args.train == "pruner":
                wanted["pruner_rank"] = args.pruner_rank
            return grow(adapters, self.backbone, **wanted)
        if args.train == "pruner":
            raise OptionError(
                "--train pruner needs --start-from with the streams that the pruner is for"
            )
        modules = tuple(args.target_modules or self.backbone.layers[-1].linear_modules())
        config = StreamConfig(
            num_streams=args.num_streams,
            num_msa_layers=args.num_msa_layers,
            mode=args.mode,
            lora_rank=args.lora_rank,
            lora_alpha=args.lora_alpha,
            target_modules=modules if args.lora_rank else (),
            conditioner_rank=args.conditioner_rank,
            conditioner_hidden=args.conditioner_hidden,
        )
        return StreamAdapters(config, self.backbone, args.embedding_std)

    def _objective(self, common: Common) -> Objective:
        if self.args.train == "pruner":
            return PrunerObjective(common)
        if self.args.mode == "shared":
            return SharedObjective(common, self.args.main_weight, self.args.stream_weight)
        return LosslessObjective(common)

    def _groups(self) -> list[dict[str, object]]:
        """Return the trained parameters with their learning rates; others are frozen."""
        embeddings, conditioner, rest = [], [], []
        for name, parameter in self.adapters.named_parameters():
            if name.startswith("pruner") != (self.args.train == "pruner"):
                parameter.requires_grad_(False)
                continue
            home = (
                embeddings
                if name == "stream_embeddings"
                else conditioner
                if "conditioner" in name
                else rest
            )
            home.append(parameter)
        pairs = (
            (embeddings, self.args.embedding_lr),
            (rest, self.args.lr),
            (conditioner, self.args.conditioner_lr),
        )
        return [{"params": parameters, "lr": lr} for parameters, lr in pairs if parameters]

    def _texts(self) -> tuple[list[Example], list[Example]]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.args.model, local_files_only=True)
        examples = read_examples(self.args.data, tokenizer, self.args.max_length)
        if self.reader is not None:
            examples = [e for e in examples if e.key in self.reader]
        return split_held_out(examples, self.args.held_out)

    def _refresh(self) -> None:
        """Take in texts that were added to the data files since; held-out prompts stay held out."""
        if self.args.states:
            self.reader = StateReader(self.args.states)
        held = {e.prompt for e in self.held_out}
        train, newly_held = self._texts()
        self.train = [e for e in (*train, *newly_held) if e.prompt not in held]

    def _states(self, example: Example) -> States:
        if self.reader is not None:
            return self.reader[example.key]
        with torch.no_grad():
            return compute_states(
                self.backbone, example.prompt, example.answer, self.adapters.config.num_msa_layers
            )

    def rate(self) -> float:
        """Return the learning rate's factor: linear warm-up, then linear decay until the budget is spent."""
        done, args = self.fraction(), self.args
        warm = min(1.0, (self.progress.step + 1) / max(1, args.warmup))
        return warm * (args.final_lr + (1 - args.final_lr) * (1 - done))

    def fraction(self) -> float:
        """Return how much of the budget (steps or minutes) is spent, 0..1."""
        if self.args.max_minutes:
            return min(1.0, self.progress.elapsed_s / (60 * self.args.max_minutes))
        return min(1.0, self.progress.step / self.args.steps)

    def step(self, batch: Sequence[Selection]) -> dict[str, object]:
        """Make one optimizer step; return what goes to the log."""
        args, factor = self.args, self.rate()
        total, figures = self.objective.loss(batch, args.seed * 1_000_003 + self.progress.step)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * factor
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.zero_grad(set_to_none=True)
        if (
            total.requires_grad
        ):  # a process without a share of the batch has nothing to differentiate
            total.backward()
        workers.sum_gradients(trained)
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.progress.step += 1
        self.progress.positions += sum(len(s.positions) for s in batch)
        return {**figures, "grad_norm": round(float(norm), 4), "lr_factor": round(factor, 5)}

    def evaluate(self) -> dict[str, object]:
        """Measure the held-out texts with the whole vocabulary, at a fixed sample of positions."""
        args = self.args
        return self.objective.evaluate(
            [select(e, args.eval_fraction, f"held out {e.key}") for e in self.held_out]
        )

    def run(self) -> None:
        """Train until the budget is spent, then write the checkpoint."""
        args, progress = self.args, self.progress
        log = (self.work / "train_log.jsonl").open("a", encoding="utf-8")
        first = workers.rank() == 0

        def write(record: dict[str, object]) -> None:
            if not first:
                return
            log.write(json.dumps({**asdict(progress), **record}) + "\n")
            log.flush()

        if first:
            self._announce()
        last_save = last_eval = last = workers.first_s(time.monotonic())
        bar = tqdm(total=1000, desc="training", bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}",
                   disable=not first)  # fmt: skip
        bar.update(int(1000 * self.fraction()))
        while self.fraction() < 1:
            if progress.epoch and not progress.batch:
                self._refresh()
            batches = epoch_batches(
                self.train,
                num_positions=args.positions,
                fraction=args.fraction,
                seed=args.seed,
                epoch=progress.epoch,
            )
            for number, batch in enumerate(batches):
                if number < progress.batch:
                    continue
                record = self.step(batch)
                progress.batch += 1
                now = workers.first_s(time.monotonic())
                progress.elapsed_s, last = progress.elapsed_s + now - last, now
                write(record)
                bar.update(int(1000 * self.fraction()) - bar.n)
                bar.set_postfix(step=progress.step, epoch=progress.epoch, loss=record["loss"])
                if self.fraction() >= 1:
                    break
                if now - last_save > args.save_seconds:
                    self._save_state()
                    last_save = now
                if args.eval_seconds and now - last_eval > args.eval_seconds and self.held_out:
                    write({"held_out": self.evaluate()})
                    last_eval = workers.first_s(time.monotonic())
            else:
                progress.epoch, progress.batch = progress.epoch + 1, 0
        bar.close()
        if self.held_out:
            write({"held_out": self.evaluate(), "final": True})
        log.close()
        self._save_state()
        if first:
            self._export()

    def _announce(self) -> None:
        answers = sum(e.num_positions for e in self.train)
        trained = sum(p.numel() for p in self.adapters.parameters())
        budget = (
            f"{self.args.max_minutes:g} minutes"
            if self.args.max_minutes
            else f"{self.args.steps} steps"
        )
        print(
            f"{len(self.train)} texts, {answers} positions ({self.args.fraction:.0%} of them per epoch), "
            f"{len(self.held_out)} held out; {trained:,} parameters; budget {budget}, step {self.progress.step} done",
            flush=True,
        )
        batches = epoch_batches(
            self.train,
            num_positions=self.args.positions,
            fraction=self.args.fraction,
            seed=self.args.seed,
            epoch=0,
        )
        trial = next(iter(batches))
        started = time.monotonic()
        with torch.no_grad():
            self.objective.loss([trial[0]], 0)
        # A step costs three times its forward pass; the trial is one text of the batch.
        share = len(trial[0].positions) / sum(len(s.positions) for s in trial)
        step_s = 3 * (time.monotonic() - started) / share / workers.count()
        steps = 60 * self.args.max_minutes / step_s if self.args.max_minutes else self.args.steps
        print(
            f"about {step_s:.1f} s a step: {steps:.0f} steps in {steps * step_s / 60:.0f} minutes",
            flush=True,
        )

    def _save_state(self) -> None:
        if workers.rank():
            return
        state = {
            "adapters": self.adapters.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        with atomic_file(self.state_file, if_exists="replace") as path:
            torch.save(state, path)

    def _resume(self) -> None:
        state = torch.load(self.state_file, weights_only=True)
        self.adapters.load_state_dict(state["adapters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])

    def _export(self) -> None:
        sources: dict[str, int] = {}
        for example in self.train:
            sources[example.key[0]] = sources.get(example.key[0], 0) + 1
        described = {
            "arguments": vars(self.args),
            "progress": asdict(self.progress),
            "texts_by_source": sources,
            "answer_positions": sum(e.num_positions for e in self.train),
        }
        extra = {
            "train_log.jsonl": (self.work / "train_log.jsonl").read_text(encoding="utf-8"),
            "train_args.json": json.dumps(described, indent=1) + "\n",
        }
        name = self.args.base_name or self.args.model
        save_checkpoint(
            self.output, self.adapters, name, getattr(torch, self.args.save_dtype), extra
        )
        print(f"wrote {self.output}", flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train", description="Train speculative streams for a frozen model."
    )
    parser.add_argument("--model", required=True, help="local Hugging Face model folder")
    parser.add_argument(
        "--base-name", help="name of the base model written to the checkpoint (default: --model)"
    )
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        help="JSON-lines files: distilled ids, messages or completions",
    )
    parser.add_argument(
        "--states",
        help="base states that distill.py kept (prefix); texts without them are left out",
    )
    parser.add_argument("--output", required=True, help="checkpoint folder to write")
    parser.add_argument(
        "--start-from",
        help="schema-1 checkpoint to start from; its shape wins, streams may be added",
    )
    group = parser.add_argument_group("what is trained")
    group.add_argument("--train", default="streams", choices=("streams", "pruner"))
    group.add_argument("--mode", default="lossless", choices=("lossless", "shared"))
    group.add_argument("--main-weight", type=float, default=1.0, help="α_0, shared mode")
    group.add_argument("--stream-weight", type=float, default=0.1, help="α_j, shared mode")
    group.add_argument("--pruner-rank", type=int, default=8, help="with --train pruner")
    group = parser.add_argument_group("shape")
    group.add_argument("--num-streams", type=int, default=4, help="γ")
    group.add_argument("--num-msa-layers", type=int, default=12, help="N_s")
    group.add_argument("--lora-rank", type=int, default=16)
    group.add_argument("--lora-alpha", type=float, default=32.0)
    group.add_argument(
        "--target-modules", nargs="*", help="linear layers that get LoRA (default: all)"
    )
    group.add_argument(
        "--conditioner-rank",
        type=int,
        default=64,
        help="0 leaves the conditioner out (and hidden 0)",
    )
    group.add_argument("--conditioner-hidden", type=int, default=128)
    group.add_argument(
        "--embedding-std", type=float, default=1.0, help="scale of the untrained stream embeddings"
    )
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--steps", type=int, default=1000, help="budget in steps, unless --max-minutes is given"
    )
    group.add_argument(
        "--max-minutes",
        type=float,
        default=0.0,
        help="budget in minutes; the decay follows the clock",
    )
    group.add_argument("--positions", type=int, default=768, help="stream positions of a step")
    group.add_argument(
        "--fraction", type=float, default=0.5, help="share of a text's positions used per epoch"
    )
    group.add_argument("--lr", type=float, default=2e-3, help="of the adapters")
    group.add_argument("--embedding-lr", type=float, default=4e-2)
    group.add_argument("--conditioner-lr", type=float, default=2e-3)
    group.add_argument(
        "--final-lr", type=float, default=0.05, help="share of the learning rate left at the end"
    )
    group.add_argument("--warmup", type=int, default=40, help="steps")
    group.add_argument("--beta2", type=float, default=0.99)
    group.add_argument("--clip", type=float, default=1.0)
    group.add_argument("--alpha-decay", type=float, default=0.8, help="α_j ∝ this to the power j-1")
    group.add_argument(
        "--num-frequent", type=int, default=4096, help="tokens always in the head's subset"
    )
    group.add_argument(
        "--num-random", type=int, default=1024, help="sampled others in the head's subset"
    )
    group.add_argument("--max-length", type=int, default=1024)
    group = parser.add_argument_group("running")
    group.add_argument("--held-out", type=int, default=64, help="texts kept for measuring")
    group.add_argument(
        "--eval-fraction", type=float, default=0.25, help="share of their positions measured"
    )
    group.add_argument("--eval-seconds", type=float, default=300.0)
    group.add_argument("--save-seconds", type=float, default=180.0)
    group.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    group.add_argument(
        "--save-dtype", default="bfloat16", choices=("bfloat16", "float16", "float32")
    )
    group.add_argument(
        "--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice"
    )
    group.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    if not args.conditioner_rank:
        args.conditioner_hidden = 0
    if not math.isfinite(args.max_minutes) or args.max_minutes < 0:
        print("error: --max-minutes must be zero or more", file=sys.stderr)
        return 2
    try:
        with workers.group():
            Trainer(args).run()
    except SpecStreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
