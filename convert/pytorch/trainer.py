"""The training loop: budget, learning rate, log, checkpoints, exact resume; knows no loss."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ...train.batches import Selection
from ...train.data import Example, split_held_out
from ...train.next_token import NUM_TEXTS, fit_next_token
from ...weights.files import atomic_file
from . import workers
from .backbone import Backbone
from .checkpoint import save_checkpoint
from .data import (
    epoch_batches,
    read_examples,
    select,
)
from .loss import VocabularySampler
from .objectives import Common
from .start import make_adapters, make_objective, parameter_groups
from .states import StateReader, States, compute_states


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
        self.adapters = make_adapters(args, self.backbone)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(args, self.adapters), betas=(0.9, args.beta2), weight_decay=0.0
        )
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.progress = Progress()
        self.reader = StateReader(*args.states) if args.states else None
        self.train, self.held_out = self._texts()
        self.state_file = self.work / "state.pt"
        if not self.state_file.exists():
            self._fit_next_token()
        answers = (e.answer for e in self.train)
        sampler = VocabularySampler(
            self.backbone.vocab_size, answers, args.num_frequent, args.num_random
        )
        self.objective = make_objective(
            args, Common(self.backbone, self.adapters, sampler, self._states, args.alpha_decay)
        )
        if self.state_file.exists():
            self._resume()

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
            self.reader = StateReader(*self.args.states)
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

    def _fit_next_token(self) -> None:
        """Give a map of the next token that is still zero its start, from the training texts."""
        target = self.adapters.next_token
        if target is None or target.lora_B.weight.any():
            return
        texts = (
            (
                self._states(e).hidden.float().numpy(),
                self.backbone.embed(torch.tensor(e.answer[:-1])).float().numpy(),
            )
            for e in self.train[:NUM_TEXTS]
        )
        found = fit_next_token(self.adapters.config.next_token_rank, texts)
        target.lora_A.weight.data.copy_(torch.from_numpy(found.a.T))
        target.lora_B.weight.data.copy_(torch.from_numpy(found.b.T))
        if not workers.rank():
            print(
                f"the next token explains {found.share:.0%} of how hidden states change", flush=True
            )

    def _batches(self, epoch: int) -> Iterable[list[Selection]]:
        return epoch_batches(
            self.train,
            num_positions=self.args.positions,
            fraction=self.args.fraction,
            seed=self.args.seed,
            epoch=epoch,
            group_size=self.args.group_size,
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
        self.objective.done = self.fraction()
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
                   disable=None if first else True)  # fmt: skip
        bar.update(int(1000 * self.fraction()))
        while self.fraction() < 1:
            if progress.epoch and not progress.batch:
                self._refresh()
            for number, batch in enumerate(self._batches(progress.epoch)):
                if number < progress.batch:
                    continue
                record = self.step(batch)
                progress.batch += 1
                now = workers.first_s(time.monotonic())
                progress.elapsed_s, last = progress.elapsed_s + now - last, now
                write(record)
                bar.update(int(1000 * self.fraction()) - bar.n)
                loss = record.get("loss", record.get("main_loss"))
                bar.set_postfix(step=progress.step, epoch=progress.epoch, loss=loss)
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
        answers = sum(len(e.positions) for e in self.train)
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
        trial = next(iter(self._batches(0)))
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
        self._cut_log()

    def _cut_log(self) -> None:
        """Drop what the log says of steps that the saved state does not know; they will be made again."""
        log = self.work / "train_log.jsonl"
        if workers.rank() or not log.exists():
            return
        lines = [
            line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")
        ]
        kept = [line for line in lines if json.loads(line)["step"] <= self.progress.step]
        with atomic_file(log, if_exists="replace") as path:
            path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def _export(self) -> None:
        sources: dict[str, int] = {}
        for example in self.train:
            sources[example.key[0]] = sources.get(example.key[0], 0) + 1
        described = {
            "arguments": {name: _portable(name, value) for name, value in vars(self.args).items()},
            "progress": asdict(self.progress),
            "texts_by_source": sources,
            "answer_positions": sum(len(e.positions) for e in self.train),
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


def _portable(name: str, value: object) -> object:
    """Return an argument as it goes into the checkpoint: of a path its last part, which says nothing of the machine."""
    if name in ("data", "states") and isinstance(value, list):
        return [Path(part).name for part in value]
    if name in ("model", "output", "start_from") and value:
        return Path(str(value)).name
    return value
