"""What drafts in place of streams: a folder of converted heads or layers, or a whole draft model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import mlx.nn as nn

from ..errors import ModelError, brief
from ..model.backbone import Backbone
from ..model.probe import check_backbone
from ..speculation.drafters import Drafter
from ..speculation.drafters.draft_model import DraftModelDrafter
from ..speculation.drafters.trained import trained_drafter
from ..weights.drafter import CONFIG_FILE, load_drafter

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


def is_trained_drafter(name: str | Path) -> bool:
    """Tell whether a name is that of a folder here with a converted or trained drafter."""
    return (Path(name).expanduser() / CONFIG_FILE).is_file()


def drafter_in(folder: Path, model: nn.Module, backbone: Backbone) -> Drafter:
    """Load the trained drafter of a folder, made sure to belong to `model`.

    Raises:
        StreamsError: the files are damaged, or of another base.
    """
    weights = load_drafter(folder)
    weights.check_base(model)
    return trained_drafter(backbone, weights.config, weights.tensors)


def drafter_of_model(
    name: str,
    draft: nn.Module,
    backbone: Backbone,
    tokenizers: tuple[TokenizerWrapper, TokenizerWrapper] | None = None,
) -> Drafter:
    """Return a draft model as a drafter.

    tokenizers: the model's and the draft model's, if known; else their sizes must agree.

    Raises:
        ModelError: it cannot draft, or has another vocabulary.
    """
    try:
        own = Backbone(draft)
        check_backbone(own)
    except ModelError as error:
        raise ModelError(f"the draft model {name} cannot be used: {brief(error, 500)}.") from error
    if tokenizers is None:
        sizes = [backbone.vocab_size, own.vocab_size]
        reason = f"it has {sizes[1]} tokens and the model {sizes[0]}" if len(set(sizes)) > 1 else ""
    else:
        reason = _vocabularies_differ(*tokenizers)
    if reason:
        raise ModelError(
            f"the draft model {name} has another vocabulary than the model: {reason}; use a draft "
            "model of the same family, whose tokenizer is the same."
        )
    return DraftModelDrafter(backbone, own)


def _vocabularies_differ(tokenizer: TokenizerWrapper, other: TokenizerWrapper) -> str:
    """Say how two tokenizers differ in the tokens that text is made of; nothing if they do not.

    Special tokens may: families add some to one size and not to another.
    """
    first, second = tokenizer.get_vocab(), other.get_vocab()
    special = {*tokenizer.get_added_vocab(), *other.get_added_vocab()}
    for token, number in first.items():
        if token not in special and second.get(token) != number:
            found = second.get(token)
            has = "lacks it" if found is None else f"has {found}"
            return f"{token!r} is token {number}, and the draft model {has}"
    return ""
