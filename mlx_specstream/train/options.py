# ruff: noqa: RUF009 (`option` is `dataclasses.field` in other words)
"""How a run trains: every option, its default, its help and its bounds, in one place.

Names that mlx-lm's `lora` has keep their meaning there. The command lines of both trainers, MLX's
and PyTorch's, are made from this class.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ..config import Mode, RopeOffset, StreamConfig
from ..errors import OptionError

Part = Literal["streams", "pruner"]
Schedule = Literal["linear", "cosine", "constant"]


class Adds(Protocol):
    """A parser of argparse, or a group of one."""

    def add_argument(self, *flags: str, **kwargs: Any) -> argparse.Action: ...


def option(
    default: Any,
    text: str,
    low: float | None = None,
    high: float | None = None,
    *,
    choices: tuple[str, ...] = (),
    free: bool = False,
) -> Any:
    """Return a field with its help and bounds; `free` ones may change when a run is resumed."""
    bounds = {"help": text, "low": low, "high": high, "choices": choices, "free": free}
    return field(default=default, metadata=bounds)


ROUTERS = ("gate", "router", "wg")
"""Last names of the linear modules that choose experts."""


@dataclass(frozen=True)
class TrainOptions:
    """One training run.

    Raises:
        OptionError: a value is out of range.
    """

    # what is trained
    mode: Mode = option(
        "lossless", "lossless: exact text; shared: a fine-tune", choices=("lossless", "shared")
    )
    part: Part = option(
        "streams",
        "streams, with a pruner if --pruner-rank is given; or the pruner of finished streams alone",
        choices=("streams", "pruner"),
    )
    num_streams: int = option(4, "streams γ, tokens guessed beyond the next one", 1, 32)
    num_msa_layers: int = option(0, "upper layers N_s that run streams; 0: four in ten", 0)
    lora_rank: int = option(16, "rank of the stream adapters; 0: none", 0)
    lora_alpha: float = option(32.0, "the adapters are scaled by alpha / rank", 0)
    target_modules: tuple[str, ...] = option((), "linear modules that get adapters (all)")
    conditioner_rank: int = option(64, "parent-conditioned candidates; 0: the paper's own", 0)
    conditioner_hidden: int = option(128, "width of the conditioner's MLP", 0)
    conditioner_tokens: int = option(1, "tokens before a candidate that the conditioner sees", 1, 2)
    next_token_rank: int = option(
        0,
        "streams know the next token from their start on, and are always deferred; 0: they do not",
        0,
    )
    stream_init_rank: int = option(0, "rank of the map f in S = f(M) + P; 0: identity", 0)
    rope_offset: RopeOffset = option(
        "position_plus_stream",
        "RoPE position of stream j at t: t + j, or t",
        choices=("position_plus_stream", "position"),
    )
    value_rotation: float = option(0.0, "angle ε by which stream values turn", 0)
    pruner_rank: int = option(
        0, "also train an early-exit pruner of this rank; 8 is the paper's", 0
    )
    # data
    max_seq_length: int = option(1024, "longer texts are cut", 4)
    mask_prompt: bool = option(True, "train on completions only")
    position_fraction: float = option(0.5, "share of a text's positions used per epoch", 0, 1)
    held_out: int = option(64, "texts kept for validation if there is no valid.jsonl", 0)
    # optimisation
    iters: int = option(1000, "batches to train on", 1)
    max_minutes: float = option(
        0.0, "minutes of training in place of --iters, the decay by the clock; 0: off", 0
    )
    batch_size: int = option(8, "texts per batch, over all processes", 1)
    grad_accumulation_steps: int = option(1, "batches per update", 1)
    learning_rate: float = option(2e-3, "of the adapters and the conditioner", 0)
    embedding_learning_rate: float = option(0.0, "of the stream embeddings; 0: from their scale", 0)
    lr_schedule: Schedule = option(
        "linear", "decay after the warm-up", choices=("linear", "cosine", "constant")
    )
    warmup: int = option(20, "updates of linear warm-up", 0)
    final_lr: float = option(0.05, "share of the learning rate left at the end", 0, 1)
    beta2: float = option(0.99, "AdamW's second moment", 0, 1)
    weight_decay: float = option(0.0, "AdamW's", 0)
    clip: float = option(1.0, "largest norm of the gradient", 0)
    alpha_decay: float = option(0.8, "α_j ∝ this to the power j - 1; 1: equal", 0, 1)
    soft_targets: float = option(
        0.0, "share of the loss that is the frozen model's distribution", 0, 1
    )
    main_loss: float = option(1.0, "α_0, weight of the main stream's loss (shared mode)", 0)
    stream_loss: float = option(0.1, "weight of the streams' loss (shared mode)", 0)
    compare_plain_lora: bool = option(
        False, "also train plain LoRA and compare the held-out loss (shared mode)", free=True
    )
    gate_start: float = option(
        -6.0, "main→stream attention opens from this score (shared mode)", -50, 0
    )
    start_scale: float = option(
        0.3, "share of lossless streams' adapters kept when shared mode starts from them", 0, 1
    )
    seed: int = option(0, "of everything random", 0)
    # computing
    sampled_vocab: int = option(
        -1, "tokens the head computes in a step; 0: all; -1: all on a GPU, 5120 on a CPU", -1
    )
    segment_size: int = option(16, "positions of a segment", 1)
    rows_per_pass: int = option(4096, "stream rows that are in memory at a time", 1)
    grad_checkpoint: bool = option(False, "recompute layers on the way back to save memory")
    # watching
    steps_per_report: int = option(10, "batches between lines of the log", 1, free=True)
    steps_per_eval: int = option(200, "batches between validations; 0: only at the end", 0)
    val_batches: int = option(-1, "batches of a validation; -1: all", -1)
    save_every: int = option(50, "batches between checkpoints", 1, free=True)
    patience: int = option(0, "stop after this many validations without a gain; 0: never", 0)
    verdict_prompts: int = option(8, "validation prompts decoded before and after", 0)
    verdict_tokens: int = option(64, "tokens decoded of each", 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for f in dataclasses.fields(self):
            check_value(f, getattr(self, f.name), flag_of(f.name))
        if not self.position_fraction > 0:
            raise OptionError("--position-fraction must be above 0.")
        if not 0 < self.learning_rate < float("inf"):
            raise OptionError("--learning-rate must be above 0.")
        if self.mode == "shared" and self.pruner_rank:
            raise OptionError(
                "--pruner-rank is trained with lossless streams only; leave it out in shared mode."
            )
        if self.mode == "shared" and self.next_token_rank:
            raise OptionError(
                "--next-token-rank is for lossless streams: in shared mode a token is drawn from a row "
                "that has seen its streams, which cannot know it yet; leave it out."
            )
        if self.mode == "shared" and self.part == "pruner":
            raise OptionError("--part pruner is for lossless streams; leave out --mode shared.")
        if bool(self.conditioner_rank) != bool(self.conditioner_hidden):
            raise OptionError("--conditioner-rank and --conditioner-hidden are both 0 or both not.")

    @property
    def num_batches(self) -> int:
        """Return how many batches there are to train on; by the clock there is no end of them."""
        return sys.maxsize if self.max_minutes else self.iters

    @property
    def num_updates(self) -> int:
        """Return how often the weights are updated; the last update may see fewer batches."""
        return -(-self.num_batches // self.grad_accumulation_steps)

    def msa_layers(self, num_layers: int) -> int:
        """Return N_s for a model of so many layers.

        Raises:
            OptionError: more MSA layers than layers.
        """
        num_msa = self.num_msa_layers or max(1, round(0.4 * num_layers))
        if num_msa > num_layers:
            raise OptionError(
                f"--num-msa-layers {num_msa} is more than the model's {num_layers} layers; name at "
                "most as many."
            )
        return num_msa

    def stream_config(self, num_layers: int, modules: tuple[str, ...]) -> StreamConfig:
        """Return what is trained, for a model whose adapted layers have these linear modules.

        Unless modules are named, all get adapters but those that choose experts: a choice has no
        gradient, and a stream row that goes to other experts than its main row makes them be read.

        Raises:
            OptionError: more MSA layers than layers, a module that not all those layers have, or
                no module that they do.
        """
        num_msa = self.msa_layers(num_layers)
        usual = tuple(name for name in modules if name.rpartition(".")[2] not in ROUTERS)
        targets = (self.target_modules or usual) if self.lora_rank else ()
        if missing := [name for name in targets if name not in modules]:
            raise OptionError(
                f"--target-modules names {missing[0]!r}, which not all of the model's adapted layers "
                f"have; they have {', '.join(modules) or 'no linear module in common'}."
            )
        if self.lora_rank and not targets:
            raise OptionError(
                "the layers that streams run in have no linear module in common, so adapters have no "
                "place; train with --lora-rank 0, or with fewer --num-msa-layers."
            )
        return StreamConfig(
            num_streams=self.num_streams,
            num_msa_layers=num_msa,
            mode=self.mode,
            rope_offset=self.rope_offset,
            stream_init_rank=self.stream_init_rank,
            lora_rank=self.lora_rank,
            lora_alpha=self.lora_alpha if self.lora_rank else 0.0,
            target_modules=targets,
            value_rotation=self.value_rotation,
            pruner_rank=self.pruner_rank,
            conditioner_rank=self.conditioner_rank,
            conditioner_hidden=self.conditioner_hidden,
            conditioner_tokens=self.conditioner_tokens if self.conditioner_rank else 1,
            next_token_rank=self.next_token_rank,
        )

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "target_modules": list(self.target_modules)}

    def changed(self, before: Mapping[str, Any]) -> str | None:
        """Return the first option that must not, but does differ from those of a run begun."""
        now = self.to_dict()
        for f in dataclasses.fields(self):
            if not f.metadata["free"] and before.get(f.name, f.default) != now[f.name]:
                return f"{flag_of(f.name)} was {before.get(f.name)} and is now {now[f.name]}"
        return None


def check_value(f: dataclasses.Field[Any], value: Any, flag: str) -> None:
    """Refuse what an option's bounds do not allow.

    Raises:
        OptionError: it says `flag`.
    """
    low, high, choices = (f.metadata[name] for name in ("low", "high", "choices"))
    if low is not None and not value >= low:
        raise OptionError(f"{flag} must be at least {low}, got {value}.")
    if high is not None and not value <= high:
        raise OptionError(f"{flag} must be at most {high}, got {value}.")
    if choices and value not in choices:
        raise OptionError(f"{flag} must be one of {', '.join(choices)}, got {value!r}.")


FIELDS = {f.name: f for f in dataclasses.fields(TrainOptions)}


def add_option(parser: Adds, name: str, *flags: str, text: str = "", **kwargs: Any) -> None:
    """Add an option to a parser or a group of one, as argparse's `add_argument` does.

    flags: `--NAME` unless given. text: help, the table's unless given. kwargs: default, dest.
    """
    default, choices = FIELDS[name].default, FIELDS[name].metadata["choices"]
    shown = kwargs["default"] if kwargs.get("default") is not None else default
    text, flags = text or FIELDS[name].metadata["help"], flags or (flag_of(name),)
    if isinstance(default, tuple):
        parser.add_argument(*flags, nargs="*", metavar="MODULE", help=text, **kwargs)
        return
    kwargs["help"] = f"{text} ({shown})"
    if choices:
        kwargs["choices"] = choices
    if isinstance(default, bool):
        parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **kwargs)
    else:
        parser.add_argument(*flags, type=type(default), **kwargs)


def flag_of(name: str) -> str:
    """Return an option's name on the command line."""
    return "--" + name.replace("_", "-")


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # The published parameter count of lossless mode, 5.4e5 on a 7B model: q and v, rank 8, four
    # layers; marginal candidates, equal weights, every position.
    "paper": {
        "num_msa_layers": 4,
        "lora_rank": 8,
        "lora_alpha": 16.0,
        "target_modules": ("self_attn.q_proj", "self_attn.v_proj"),
        "conditioner_rank": 0,
        "conditioner_hidden": 0,
        "alpha_decay": 1.0,
        "position_fraction": 1.0,
    },
}
