"""Who competes: the drafters of a folder, joined to one base in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_specstream.config import DecodeConfig, TreeSpec
from mlx_specstream.config.decode import Schedule
from mlx_specstream.errors import OptionError
from mlx_specstream.loading.drafter import drafter_in, drafter_of_model, is_trained_drafter
from mlx_specstream.loading.load import StreamModel, load
from mlx_specstream.speculation.streams import Streams
from mlx_specstream.weights.drafter import load_drafter
from mlx_specstream.weights.shipped import find_streams

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

LOOK_UP = "lookup"
INLINE: Schedule = "inline"
OURS = "streams (ours)"
FIELD = {
    "streams (the paper's)": "paper+inline",
    OURS: "streams",
    "Medusa": "medusa",
    "Hydra": "hydra",
    "EAGLE-2": "eagle",
    "EAGLE-3": "eagle3",
    "draft model": "draft-model",
    "look-up": LOOK_UP,
    "streams + look-up": "streams+lookup",
}
"""Methods by name, and in which folder each is; `+lookup` adds look-up, `+inline` is a schedule."""
TREES = ("chain4", "8", "16")


@dataclass(frozen=True)
class Rival:
    """A drafter joined to the model. parameters: those it adds; of a draft model, all of its own."""

    name: str
    model: StreamModel
    parameters: int
    drafts: tuple[str, ...] = ("streams",)
    schedule: Schedule = "auto"

    def config(self, tree: str) -> DecodeConfig:
        """Return how it decodes with a tree."""
        return DecodeConfig(TreeSpec.parse(tree), schedule=self.schedule, drafts=self.drafts)


def entered(folder: str | None, others: Iterable[str]) -> dict[str, str]:
    """Return the words of those that compete, by name: the field's in a folder, and NAME=PLACE.

    Raises:
        OptionError: nobody does, or a word has no name.
    """
    found = {}
    if folder is not None:
        root = Path(folder).expanduser()
        for name, word in FIELD.items():
            place, *rest = word.split("+")
            if place == LOOK_UP:
                found[name] = place
            elif any((root / place).glob("*config.json")):
                found[name] = "+".join([str(root / place), *rest])
    for text in others:
        name, equals, word = text.partition("=")
        if not (name and equals and word):
            raise OptionError(
                f"cannot read the drafter {text!r}; write NAME=FOLDER or NAME=lookup."
            )
        found[name] = word
    if not found:
        raise OptionError("nobody competes; name a --folder of drafters, or a --drafter.")
    return found


def joined(
    model_name: str, words: Mapping[str, str]
) -> tuple[list[Rival], StreamModel, TokenizerWrapper]:
    """Load the base once, and each NAME: FOLDER over it; `+lookup` and `+inline` may follow a folder.

    Raises:
        SpecStreamError: a folder cannot be loaded.
    """
    base, tokenizer = load(model_name, streams=None)
    rivals = []
    loaded: dict[str, tuple[StreamModel, int]] = {}
    for name, word in words.items():
        place, *modes = word.split("+")
        if unknown := [mode for mode in modes if mode not in (LOOK_UP, INLINE)]:
            raise OptionError(f"{name}: a folder is followed by +lookup or +inline, not {unknown}.")
        if place == LOOK_UP:
            rivals.append(Rival(name, base, 0, (LOOK_UP,)))
            continue
        if place not in loaded:
            loaded[place] = _drafting(base, place)
        model, size = loaded[place]
        drafts = ("streams", LOOK_UP) if LOOK_UP in modes else ("streams",)
        rivals.append(Rival(name, model, size, drafts, INLINE if INLINE in modes else "auto"))
    return rivals, base, tokenizer


def _drafting(base: StreamModel, place: str) -> tuple[StreamModel, int]:
    """Return the base with what a folder holds, and how many parameters that has."""
    path = Path(place).expanduser()
    tensors: Mapping[str, mx.array]
    if is_trained_drafter(path):
        model = replace(base, drafter=drafter_in(path, base.model, base.backbone))
        tensors = load_drafter(path).tensors
    elif (path / "config.json").is_file():
        small = load(place, streams=None)[0].model
        model = replace(base, drafter=drafter_of_model(path.name, small, base.backbone))
        tensors = dict(tree_flatten(small.parameters()))
    else:
        weights = find_streams(place, base.model, Path())
        assert weights is not None
        model = replace(base, streams=Streams(base.backbone, weights.config, weights.tensors))
        tensors = weights.tensors
    return model, sum(tensor.size for name, tensor in tensors.items() if name != "d2t")


def training(word: str) -> dict[str, Any]:
    """Return positions, updates and minutes of a rival's training, as its folder tells them.

    Streams are told of by the PyTorch trainer's train_args.json.
    """
    folder = Path(word.split("+")[0]).expanduser()
    if (own := folder / "trained.json").is_file():
        found: dict[str, Any] = json.loads(own.read_text(encoding="utf-8"))
        return found
    if (torch := folder / "train_args.json").is_file():
        place = json.loads(torch.read_text(encoding="utf-8"))["progress"]
        minutes = round(place["elapsed_s"] / 60, 1)
        return {"positions": place["positions"], "updates": place["step"], "minutes": minutes}
    return {}
