"""`specstream train`: trains streams for a model on data, and says what they give.

    specstream train --model mlx-community/SmolLM2-135M-Instruct --data chat.jsonl --adapter-path out

Options are those of `TrainOptions`; where mlx-lm's `lora` has one, it has its name.
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import StreamConfig
from ..errors import DataError, ModelError, OptionError
from ..loading.load import StreamModel, load
from ..model.backbone import Backbone
from ..train.batches import select
from ..train.data import Example, read_records, split_held_out, tokenize
from ..train.drafters import DRAFTERS, tokens_per_pass, train_drafter
from ..train.initialise import hidden_rms, untrained, with_next_token
from ..train.objective import LosslessObjective
from ..train.options import FIELDS, PRESETS, TrainOptions, add_option
from ..train.pruner import PrunerObjective
from ..train.shared import SharedObjective
from ..train.state import SavedState, resumable
from ..train.task import Task
from ..train.trainer import DivergenceError, Trainer
from ..train.vocabulary import VocabularySampler
from ..train.warm_start import warm_start
from ..weights.checkpoint import CONFIG_FILE, WEIGHTS_FILE, StreamWeights, load_streams
from ..weights.fingerprint import base_dims

CPU_VOCABULARY = 5120
__all__ = ["DivergenceError", "build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specstream train",
        description="Train speculative streams for a model; its own weights are never changed.",
    )
    parser.add_argument(
        "--model", required=True, help="folder or hub id of the base model, also quantised, or demo"
    )
    parser.add_argument(
        "--data",
        required=True,
        help="a .jsonl file, a folder with train.jsonl and valid.jsonl, or a hub data set",
    )
    parser.add_argument("--adapter-path", default="streams", help="folder to write (%(default)s)")
    parser.add_argument(
        "--drafter",
        choices=DRAFTERS,
        help="train this in place of streams, --num-streams heads deep; for --draft-model",
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="default", help="(%(default)s)")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --adapter-path, if there is one"
    )
    parser.add_argument(
        "--resume-adapter-file",
        metavar="FOLDER",
        help="start from these streams; their shape wins, but a pruner or shared mode may be added",
    )
    parser.add_argument("-c", "--config", help="a YAML file with any of these options")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)  # mlx-lm's habit
    for name in FIELDS:
        flags = ("--num-msa-layers", "--num-layers") if name == "num_msa_layers" else ()
        add_option(parser, name, *flags, dest=name, default=None)
    return parser


def options_of(args: argparse.Namespace) -> TrainOptions:
    """Return the options: what was given, else the YAML file, else the preset, else the default.

    Raises:
        OptionError: a value is out of range, or the file is unreadable or names an unknown option.
    """
    values = dict(PRESETS[args.preset])
    if args.config:
        values |= _from_yaml(Path(args.config))
    for name in FIELDS:
        if (given := getattr(args, name)) is not None:
            values[name] = given
    return TrainOptions(**values)


def _from_yaml(path: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped, unused-ignore]

    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror}); check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise OptionError(f"{path} is not YAML; write lines like `iters: 1000`.") from None
    if not isinstance(fields, dict):
        raise OptionError(f"{path} must hold options, one `name: value` a line.")
    kinds = typing.get_type_hints(TrainOptions)
    values = {}
    for name, value in fields.items():
        key = str(name).replace("-", "_")
        if key not in kinds:
            raise OptionError(f"{path} names the unknown option {name!r}; see specstream train -h.")
        default = getattr(TrainOptions, key)
        wanted: Any = (int, float) if isinstance(default, float) else type(default)
        if isinstance(default, tuple):
            wanted = (list, tuple)
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
            raise OptionError(f"{path}: {name} is {value!r}, expected a value like {default!r}.")
        values[key] = value
    return values


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    options, folder = options_of(args), Path(args.adapter_path).expanduser()
    saved = resumable(folder, args.resume)
    if args.resume and saved is None and (folder / CONFIG_FILE).exists():
        print(f"{folder} holds a finished run; nothing is left to do.")
        return 0
    world = mx.distributed.init()
    if args.drafter and world.size() > 1:
        raise OptionError(
            "--drafter is trained by one process; start it without mlx.launch, which is for streams."
        )
    model, tokenizer = load(args.model, streams=None)
    train, valid = read_data(args.data, tokenizer, model, options, world.rank() == 0)
    if args.drafter:
        return train_other(args, options, model, train, valid)
    task = make_task(
        model,
        tokenizer,
        options,
        train,
        valid,
        folder=folder,
        base_name=Path(args.model).name if Path(args.model).exists() else args.model,
        given=_given_streams(args.resume_adapter_file, model),
        saved=saved,
    )
    trainer = Trainer(task, make_objective(task), saved=saved, world=world)
    figures = trainer.run()
    if world.rank() == 0:
        print(gain(figures, folder))
        if options.compare_plain_lora:
            print(comparison(trainer))
    return 0


def train_other(
    args: argparse.Namespace,
    options: TrainOptions,
    model: StreamModel,
    train: Sequence[Example],
    valid: Sequence[Example],
) -> int:
    """Train a drafter that is not streams, and say what it gives on held-out prompts.

    Raises:
        OptionError: an option that goes with streams alone.
    """
    for given, flag in (
        (args.resume, "--resume"),
        (args.resume_adapter_file, "--resume-adapter-file"),
        (options.mode != "lossless", "--mode"),
        (options.part != "streams", "--part"),
    ):
        if given:
            raise OptionError(f"{flag} is for streams; leave it out with --drafter.")
    folder = Path(args.adapter_path).expanduser()
    name = Path(args.model).name if Path(args.model).exists() else args.model
    losses = train_drafter(
        args.drafter,
        model.backbone,
        options,
        train,
        folder,
        name,
        sampled_vocab=_sampled(options),
    )
    prompts = list(valid or train)[: options.verdict_prompts]
    per_pass = tokens_per_pass(model, folder, prompts, options.verdict_tokens)
    print(
        f"{args.drafter}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last; {per_pass:.2f} "
        f"tokens per pass on held-out prompts.\nIt is in {folder}; use it with --draft-model {folder}."
    )
    return 0


def comparison(trainer: Trainer) -> str:
    """Train plain LoRA of the same budget, and return the sentence that compares."""
    from ..train.compare import base_loss, plain_lora_loss

    task, objective = trainer.task, trainer.objective
    if not isinstance(objective, SharedObjective) or not task.valid:
        return "Plain LoRA is compared with in shared mode and with held-out texts only."
    texts = [select(example, 1.0, (0,)) for example in task.valid]
    own = objective.main_loss(trainer.best or trainer.tensors, texts)
    return (
        f"Held-out loss per completion token: shared {own:.4f}, plain LoRA of the same budget "
        f"{plain_lora_loss(task, objective):.4f}, the base model {base_loss(task):.4f}."
    )


def read_data(
    source: str, tokenizer: Any, model: StreamModel, options: TrainOptions, talk: bool = True
) -> tuple[list[Example], list[Example]]:
    """Return training and validation examples, and say what was cut or left out.

    Raises:
        DataError: nothing to train on.
    """
    longest = min(options.max_seq_length, model.context_length or options.max_seq_length)
    parts: list[list[Example]] = []
    for split in ("train", "valid"):
        records = read_records(source, split)
        if not records and split == "train":
            raise DataError(f"{source} holds no training records; give at least one.")
        examples, report = tokenize(
            records, tokenizer, max_length=longest, mask_prompt=options.mask_prompt
        )
        if records and talk:
            print(f"{split}: {report}.", flush=True)
        parts.append(examples)
    train, valid = parts
    if not valid:
        train, valid = split_held_out(train, min(options.held_out, len(train) // 10))
    if not train:
        raise DataError(f"{source} holds too few records; give at least two.")
    worst = max(max(example.tokens) for example in [*train, *valid])
    if worst >= model.backbone.vocab_size:
        raise DataError(
            f"{source} has the token {worst}, but the model knows {model.backbone.vocab_size}; the "
            "tokenizer is another model's."
        )
    return train, valid


def make_task(
    model: StreamModel,
    tokenizer: Any,
    options: TrainOptions,
    train: Sequence[Example],
    valid: Sequence[Example],
    *,
    folder: Path,
    base_name: str | None,
    given: StreamWeights | None = None,
    saved: SavedState | None = None,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> Task:
    """Put together what the loop needs: shape, weights to start from, names.

    given: streams to start from. saved: the state of the run to continue.

    Raises:
        ModelError: streams cannot be trained for a model of this type.
    """
    backbone = model.backbone
    if backbone.is_recurrent:
        raise ModelError(
            f"streams cannot be trained for models of type {backbone.family!r}: some of their layers "
            "keep a state, which training does not follow; choose a model without such layers."
        )
    if options.part == "pruner" and given is None:
        raise OptionError(
            "--part pruner needs --resume-adapter-file with the streams that the pruner is for."
        )
    config = given.config if given else _config(options, backbone)
    tokens = mx.array([train[0].tokens])
    rms = saved.progress.rms if saved else hidden_rms(backbone, tokens, config.num_msa_layers)
    if given:
        config, start = warm_start(given, options, backbone, rms)
    else:
        start = untrained(backbone, config, rms, options.seed, options.gate_start)
    if not saved:
        texts = [e.tokens for e in train if len(e.tokens) > 3]
        start = with_next_token(start, backbone, config, texts)
    return Task(
        backbone=backbone,
        config=config,
        options=options,
        train=train,
        valid=valid,
        folder=folder,
        base_name=base_name,
        stop=set(tokenizer.eos_token_ids),
        start=start,
        rms=rms,
        say=say,
    )


def _given_streams(folder: str | None, model: StreamModel) -> StreamWeights | None:
    if folder is None:
        return None
    path = Path(folder).expanduser()
    weights = load_streams(path.parent if path.name == WEIGHTS_FILE else path)
    weights.check_base(model.model)
    return weights


def _config(options: TrainOptions, backbone: Backbone) -> StreamConfig:
    """Return what is trained; adapters go to modules that all layers have that get adapters."""
    N = backbone.num_layers
    adapted = N if options.mode == "shared" else options.msa_layers(N)
    return options.stream_config(N, base_dims(backbone.model).common_modules(adapted))


def make_objective(task: Task) -> LosslessObjective:
    """Return what computes the gradients of the task's mode."""
    options, size = task.options, _sampled(task.options)
    texts = (example.tokens[example.prompt_length :] for example in task.train)
    sampler = VocabularySampler.of_size(task.backbone.vocab_size, texts, size)
    objective: type[LosslessObjective] = LosslessObjective
    if options.part == "pruner":
        objective = PrunerObjective
    elif options.mode == "shared":
        objective = SharedObjective
    return objective(task.backbone, task.config, options, sampler)


def _sampled(options: TrainOptions) -> int:
    """Return how many tokens the head computes in a step, 0 for all."""
    if options.sampled_vocab >= 0:
        return options.sampled_vocab
    return CPU_VOCABULARY if mx.default_device() == mx.cpu else 0


def gain(figures: dict[str, dict[str, float]], folder: Path) -> str:
    """Return the last lines: decoded tokens per step before and after, and where the streams are."""
    lines = []
    for name, after in figures["after"].items():
        before = figures["before"].get(name, float(np.nan))
        lines.append(
            f"{name:>8}: {after:.2f} tokens per step on held-out prompts, {before:.2f} before "
            "training, 1.00 plain."
        )
    return "\n".join([*lines, f"The streams are in {folder}; use them with --streams {folder}."])
