"""A training run of seconds: a tiny model, texts that repeat themselves; also as a program to kill.

python -m tests.train.tiny_run FOLDER [--resume] [--whole]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_specstream.commands.train import make_objective
from mlx_specstream.machine import ranks
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.train.data import Example
from mlx_specstream.train.initialise import hidden_rms, untrained
from mlx_specstream.train.options import TrainOptions
from mlx_specstream.train.record import LOG_FILE
from mlx_specstream.train.state import resumable
from mlx_specstream.train.task import Task
from mlx_specstream.train.trainer import Trainer
from mlx_specstream.weights.fingerprint import base_dims
from tests.support.engine import small_model

VOCAB = 24
QUICK: dict[str, Any] = {
    "iters": 12,
    "batch_size": 4,
    "num_streams": 3,
    "num_msa_layers": 2,
    "lora_rank": 4,
    "conditioner_rank": 4,
    "conditioner_hidden": 8,
    "segment_size": 4,
    "rows_per_pass": 48,
    "steps_per_eval": 4,
    "steps_per_report": 1,
    "save_every": 1,
    "sampled_vocab": 16,
    "verdict_prompts": 2,
    "verdict_tokens": 6,
    "warmup": 2,
}


def own_texts(model: Any, number: int = 14, length: int = 24) -> list[Example]:
    """Return greedy texts of the model itself, three given tokens each."""
    texts = []
    random = np.random.default_rng(5)
    for index in range(number):
        tokens = [int(t) for t in random.integers(0, VOCAB, 3)]
        while len(tokens) < length - index % 5:
            tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1]).item()))
        texts.append(Example(tuple(tokens), 3, f"line {index + 1}"))
    return texts


def tiny_task(
    folder: Path,
    train: Sequence[Example] | None = None,
    valid: Sequence[Example] | None = None,
    say: Callable[[str], None] = lambda line: None,
    model: Any = None,
    **fields: Any,
) -> Task:
    model = model or small_model(vocab=VOCAB, layers=3)
    texts = own_texts(model) if train is None else list(train)
    options = TrainOptions(**{**QUICK, **fields})
    backbone = Backbone(model)
    modules = base_dims(model).common_modules(options.msa_layers(backbone.num_layers))
    config = options.stream_config(backbone.num_layers, modules)
    rms = hidden_rms(backbone, mx.array([texts[0].tokens]), config.num_msa_layers)
    held = texts[-4:] if valid is None else list(valid)
    start = untrained(backbone, config, rms, options.seed)
    own = texts[:-4] if train is None else texts
    return Task(backbone, config, options, own, held, folder, "tiny", {0}, start, rms, say)


def run_tiny(folder: Path, resume: bool = False, **fields: Any) -> dict[str, dict[str, float]]:
    task = tiny_task(folder, **fields)
    saved = resumable(folder, resume)
    return Trainer(task, make_objective(task), saved=saved).run()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run's log."""
    path = folder / LOG_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    ranks.work_apart()  # as `specstream train`: what process 0 decodes to measure, it decodes alone
    whole = {"sampled_vocab": 0} if "--whole" in sys.argv else {}
    run_tiny(Path(sys.argv[1]), "--resume" in sys.argv, **whole)
