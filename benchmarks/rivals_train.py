"""Rivals trained side by side, so that nothing but the method differs: batch, budget and optimiser.

    texts ──► batch ──► the base, once ──┬── Medusa's loss ──► AdamW
                                         ├── EAGLE's loss  ──► AdamW      ... at every learning rate
                                         └── a draft model's loss ──► AdamW

What is trained is what `specstream train --drafter` trains with the same options, but that the base
reads every text once for all of them; streams trained by `specstream train` with these options see
the same positions in the same order. Of each method's learning rates the one with the lowest loss on
held-out texts is kept. A run that was stopped goes on when the same command is given again.

    python -m benchmarks.rivals_train --model demo --data own.jsonl --output rivals \
        --iters 80 --batch-size 4 --learning-rate 5e-4 2e-3
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from benchmarks.rivals_draft_model import DraftModelObjective
from benchmarks.rivals_trainee import METHODS, Trainee, trainees
from mlx_specstream.commands.train import CPU_VOCABULARY, read_data
from mlx_specstream.errors import OptionError
from mlx_specstream.exit_status import exit_status
from mlx_specstream.loading.folders import model_folder
from mlx_specstream.loading.load import StreamModel, load
from mlx_specstream.train.batches import BatchPlan, Selection, select
from mlx_specstream.train.data import Example
from mlx_specstream.train.drafter_loss import DrafterObjective
from mlx_specstream.train.drafters import drafter_config
from mlx_specstream.train.head import Head
from mlx_specstream.train.options import TrainOptions
from mlx_specstream.train.vocabulary import VocabularySampler
from mlx_specstream.weights.drafter import save_drafter
from mlx_specstream.weights.files import atomic_file
from mlx_specstream.weights.fingerprint import fingerprint

STATE, RESULTS = "state.safetensors", "trained.json"
SAVE_EVERY = 20
HELD_OUT = 16


@dataclass
class Run:
    """All that is trained, and where it stands. reading_s: seconds of the base's passes."""

    model: StreamModel
    trainees: list[Trainee]
    sampler: VocabularySampler
    plan: BatchPlan
    reading_s: float = 0.0
    positions: int = 0
    updates: int = 0

    def __post_init__(self) -> None:
        # EAGLE-3's reads three layers on the way; what the others need is among it.
        backbone = self.model.backbone
        self.base = DrafterObjective(backbone, drafter_config("eagle3", backbone, 1))

    def update(self) -> dict[str, float]:
        """Make the next update of everything; return the losses."""
        started, batch = time.perf_counter(), self.plan.batch(self.updates)
        bases = [self.base.base(selection.example.tokens) for selection in batch]
        head = self.head(batch, self.updates)
        self.reading_s += time.perf_counter() - started
        losses = {t.name: t.update(batch, bases, head, self.updates) for t in self.trainees}
        self.positions += sum(len(selection.positions) for selection in batch)
        self.updates += 1
        return losses

    def head(self, batch: Sequence[Selection], number: int) -> Head:
        """Return the LM head of a batch's tokens, and others."""
        tokens = np.concatenate([s.example.tokens[s.example.prompt_length :] for s in batch])
        return Head.of(self.model.backbone, self.sampler.draw(tokens, (0, number)))

    def held_out(self, texts: Sequence[Example]) -> dict[str, float]:
        """Return each trainee's loss on texts, all positions of them."""
        sums = dict.fromkeys((t.name for t in self.trainees), 0.0)
        for text in texts:
            batch = [select(text, 1.0, (0,))]
            bases, head = [self.base.base(text.tokens)], self.head(batch, 0)
            for t in self.trainees:
                total, _ = t.objective.loss(t.tensors, batch, bases, head)
                sums[t.name] += float(np.array(total)) / len(texts)
        return sums

    def save(self, path: Path) -> None:
        """Write the state from which the run goes on."""
        arrays = {f"{t.name}|weights|{n}": a for t in self.trainees for n, a in t.tensors.items()}
        for t in self.trainees:
            arrays |= {f"{t.name}|optimizer|{n}": a for n, a in t.optimizer.arrays.items()}
        seconds = {t.name: t.seconds for t in self.trainees}
        place = [self.updates, self.positions, self.reading_s, seconds]
        with atomic_file(path, if_exists="replace") as new:
            mx.save_safetensors(str(new), arrays, {"place": json.dumps(place)})

    def resume(self, path: Path) -> None:
        """Take over a state that `save` wrote."""
        loaded = mx.load(str(path), return_metadata=True)
        assert isinstance(loaded, tuple)
        arrays, metadata = loaded
        self.updates, self.positions, self.reading_s, seconds = json.loads(metadata["place"])
        for t in self.trainees:
            t.seconds = seconds[t.name]
            t.tensors = {name: arrays[f"{t.name}|weights|{name}"] for name in t.tensors}
            own = f"{t.name}|optimizer|"
            t.optimizer.restore(
                {n.removeprefix(own): a for n, a in arrays.items() if n.startswith(own)}
            )


def write(
    run: Run, losses: dict[str, float], output: Path, model_name: str
) -> dict[str, dict[str, object]]:
    """Write each method's best weights as a folder that drafts; return what became of them."""
    found: dict[str, dict[str, object]] = {}
    for kind in dict.fromkeys(t.kind for t in run.trainees):
        candidates = [t for t in run.trainees if t.kind == kind]
        best = min(candidates, key=lambda t: losses[t.name])
        folder = output / kind
        if isinstance(best.objective, DraftModelObjective):
            best.objective.save(folder, best.tensors, model_folder(model_name))
        else:
            assert isinstance(best.objective, DrafterObjective)
            save_drafter(
                folder,
                best.objective.config,
                {name: tensor.astype(mx.float16) for name, tensor in best.tensors.items()},
                base_model=Path(model_name).name,
                fingerprint=fingerprint(run.model.model),
                metadata={"trained_by": "benchmarks.rivals_train", "updates": str(run.updates)},
            )
        found[kind] = {
            "learning_rate": best.rate,
            "held_out": {f"{t.rate:g}": round(losses[t.name], 4) for t in candidates},
            "positions": run.positions,
            "updates": run.updates,
            "minutes": round((best.seconds + run.reading_s) / 60, 1),
        }
        text = json.dumps(found[kind], indent=1) + "\n"
        (folder / RESULTS).write_text(text, encoding="utf-8")
    return found


def main() -> int:
    """Train, or go on, and write the folders."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals_train", description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", required=True, help="as specstream train takes it")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a folder for folders")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="NAME or NAME=RATE,RATE")
    parser.add_argument("--learning-rate", nargs="+", type=float, default=[5e-4, 2e-3])
    parser.add_argument("--iters", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-seq-length", type=int, default=256)
    parser.add_argument("--keep-layers", type=int, default=6, help="of a draft model")
    parser.add_argument("--stop-after", type=int, default=0, help="updates of this sitting")
    arguments = parser.parse_args()
    if arguments.keep_layers < 2:
        raise OptionError("a draft model keeps two layers at least, the first and the last.")
    options = TrainOptions(
        iters=arguments.iters,
        batch_size=arguments.batch_size,
        max_seq_length=arguments.max_seq_length,
    )
    output = Path(arguments.output).expanduser()
    model, tokenizer = load(arguments.model, streams=None)
    train, valid = read_data(arguments.data, tokenizer, model, options)
    texts = (example.tokens[example.prompt_length :] for example in train)
    sampler = VocabularySampler.of_size(model.backbone.vocab_size, texts, CPU_VOCABULARY)
    plan = BatchPlan(train, options.batch_size, options.position_fraction, options.seed)
    every = trainees(
        model, arguments.methods, arguments.learning_rate, arguments.keep_layers, options
    )
    run, state = Run(model, every, sampler, plan), output / STATE
    if state.exists():
        run.resume(state)
    last = min(options.iters, run.updates + (arguments.stop_after or options.iters))
    with tqdm(total=options.iters, initial=run.updates, desc="train", disable=None) as bar:
        while run.updates < last:
            losses = run.update()
            bar.update()
            if run.updates % SAVE_EVERY == 0 or run.updates in (1, last):
                run.save(state)
                shown = ", ".join(f"{name} {loss:.2f}" for name, loss in losses.items())
                bar.write(f"{run.updates:>5} updates, {run.positions:,} positions: {shown}")
    if run.updates < options.iters:
        return 0
    found = write(run, run.held_out(valid[:HELD_OUT]), output, arguments.model)
    state.unlink(missing_ok=True)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, "rivals_train"))
