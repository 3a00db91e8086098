"""Any decoder of mlx-lm, taken apart by watching it run; what cannot be followed is refused.

| file | the idea it holds |
|---|---|
| `record.py` | watch the model's own forward, compute nothing |
| `calls.py` | conclude how each layer is called, and make the calls alike |
| `states.py` | layers with a state, run so that every row of a draft leaves one |
| `embed_and_head.py` | what stands before the layers and behind them, done by the model's own code |
| `replace.py` | shallow copies in which single modules behave differently |
| `refused.py` | what is known not to work, and why |

What happens inside a layer is the layer's own code and needs no word here, as long as it rotates
by `cache.offset`, attends what `cache.update_and_fetch` returns, and sees what its mask says.
`check_backbone` compares the result with mlx-lm before a token is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import mlx.nn as nn

from ...errors import ModelError
from ...machine import ranks
from .calls import LayerCall, layer_calls, uniform
from .embed_and_head import EmbedAndHead
from .record import record
from .refused import REFUSED, STATES_ALONE
from .states import keep_states

__all__ = [
    "LayerCall",
    "Parts",
    "family_name",
    "keep_states",
    "may_be_decoded",
    "refusal",
    "take_apart",
    "uniform",
]


@dataclass(frozen=True)
class Parts:
    """A decoder taken apart: modules of the user's model, none of them copied."""

    name: str
    layers: list[nn.Module]
    calls: list[LayerCall]
    embed_and_head: EmbedAndHead


def family_name(model: nn.Module) -> str:
    """Return the name of the mlx-lm module that defines the model; mistral is its llama."""
    return type(model).__module__.rpartition(".")[2]


def may_be_decoded(model_type: str) -> bool:
    """Tell whether mlx-lm has a family of this name that is not known to be refused.

    A model itself is asked by `take_apart`.
    """
    from mlx_lm.utils import MODEL_REMAPPING

    name = str(MODEL_REMAPPING.get(model_type, model_type))
    return (
        name.replace("-", "_").isidentifier()
        and name not in REFUSED
        and find_spec(f"mlx_lm.models.{name}") is not None
    )


def take_apart(model: nn.Module) -> Parts:
    """Return the parts of `model`.

    Raises:
        ModelError: rows of a draft cannot go through it; says why.
    """
    name = family_name(model)
    try:
        if name in REFUSED:
            raise ModelError(REFUSED[name])
        recording = record(model)
        calls = layer_calls(recording)
        if all(call.recurrent or call.cache is None for call in calls):
            raise ModelError(STATES_ALONE)
        return Parts(name, recording.layers, calls, EmbedAndHead(recording, calls))
    except Exception as error:
        if ranks.is_loss(error):
            raise
        raise refusal(name, error) from error


def refusal(name: str, error: Exception) -> ModelError:
    """Return the one sentence that says why a family is refused.

    error: a `ModelError` with the reason alone, or whatever a model raises that is run in a way it
    does not know.
    """
    reason = str(error)
    if not isinstance(error, ModelError):
        text = (reason.strip() or type(error).__name__).splitlines()[0].rstrip(".")
        reason = f"its layers cannot be run row by row ({text})"
    return ModelError(
        f"models of type {name!r} cannot be decoded by mlx-specstream: {reason}; "
        "use mlx-lm itself for this one."
    )
