"""A trained drafter that is not streams: Medusa's heads, Hydra's heads, EAGLE's layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import StreamsError
from .streams import FORMAT_VERSION, MAX_STREAMS

DrafterKind = Literal["medusa", "hydra", "eagle", "eagle3"]
MAX_SIZE = 1 << 24
AUTO_DEPTH = 5  # levels that EAGLE drafts where the tree does not say, as published


@dataclass(frozen=True)
class LayerConfig:
    """A decoder layer of Llama's form that a drafter has of its own.

    `attention_bias`: queries, keys and values have one. `rope_scaling`: as in a model's
    config.json.

    Raises:
        StreamsError: a value is out of range or of the wrong type.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    max_position_embeddings: int = 2048
    attention_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise StreamsError(f"drafter config: {name} must be above 0, got {value!r}.")
        for name in (
            *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "max_position_embeddings"),
        ):
            _check_integer(name, getattr(self, name), 1, MAX_SIZE)
        if self.num_attention_heads % self.num_key_value_heads:
            raise StreamsError(
                f"drafter config: {self.num_attention_heads} query heads cannot share "
                f"{self.num_key_value_heads} key heads."
            )
        if not isinstance(self.rope_scaling, Mapping | None):
            raise StreamsError("drafter config: rope_scaling must be an object or null.")


@dataclass(frozen=True)
class DrafterConfig:
    """A trained drafter of one base model, as `drafter_config.json` describes it.

    kind: `medusa` (heads on the last state), `hydra` (heads that know the tokens drafted before;
    with a `layer`, Hydra++), `eagle` (a layer over features and shifted tokens, EAGLE-1 and -2)
    or `eagle3` (the same over features of three layers, with a head of its own).

    hidden_size, vocab_size: the base's. num_heads, num_blocks: heads, and residual blocks of each.
    own_head: the heads, or eagle3, have LM heads of their own; else they share the base's.
    bias: of eagle's `fc`, or of Hydra's own LM heads. draft_vocab_size: of eagle3's head; fewer
    than `vocab_size` with a table `d2t` of their ids. feature_layers: the layers at whose input
    eagle3 takes its features. own_embedding: the layer is of another width than the base and has
    token embeddings of its own.

    Raises:
        StreamsError: a value is out of range or of the wrong type, or does not go with the kind.
    """

    kind: DrafterKind
    hidden_size: int
    vocab_size: int
    num_heads: int = 0
    num_blocks: int = 1
    own_head: bool = False
    bias: bool = False
    layer: LayerConfig | None = None
    draft_vocab_size: int = 0
    feature_layers: tuple[int, ...] = ()
    own_embedding: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(DrafterKind):
            raise StreamsError(
                f"drafter config: kind must be one of {', '.join(get_args(DrafterKind))}, "
                f"got {self.kind!r}."
            )
        heads = self.kind in ("medusa", "hydra")
        _check_integer("hidden_size", self.hidden_size, 1, MAX_SIZE)
        _check_integer("vocab_size", self.vocab_size, 1, MAX_SIZE)
        _check_integer("num_heads", self.num_heads, int(heads), MAX_STREAMS if heads else 0)
        _check_integer("num_blocks", self.num_blocks, 1, 64)
        eagle3 = self.kind == "eagle3"
        _check_integer(
            "draft_vocab_size", self.draft_vocab_size, int(eagle3), self.vocab_size * eagle3
        )
        if not isinstance(self.feature_layers, list | tuple):
            raise StreamsError("drafter config: feature_layers must be a list of layers.")
        object.__setattr__(self, "feature_layers", tuple(self.feature_layers))
        for number in self.feature_layers:
            _check_integer("a feature layer", number, 0, 4096)
        if len(self.feature_layers) != (3 if eagle3 else 0):
            raise StreamsError(
                f"drafter config: {self.kind} takes features of {3 if eagle3 else 0} layers besides "
                f"the last, got {len(self.feature_layers)}."
            )
        if (self.layer is None) != (self.kind == "medusa") and self.kind != "hydra":
            word = "has no" if self.layer else "needs a"
            raise StreamsError(f"drafter config: {self.kind} {word} layer of its own.")
        if self.layer is not None and not isinstance(self.layer, LayerConfig):
            raise StreamsError("drafter config: layer must be an object of sizes.")
        if self.layer and not self.own_embedding and self.layer.hidden_size != self.hidden_size:
            raise StreamsError(
                f"drafter config: the layer's width {self.layer.hidden_size} is not the base's "
                f"{self.hidden_size}, so it needs token embeddings of its own."
            )
        if self.own_embedding and not eagle3:
            raise StreamsError(f"drafter config: {self.kind} has no embeddings of its own.")

    @property
    def num_levels(self) -> int:
        """Return how many tokens it can draft in a row."""
        return self.num_heads or MAX_STREAMS

    @property
    def num_features(self) -> int:
        """Return the width of what it takes from the base at each position."""
        return self.hidden_size * (len(self.feature_layers) or 1)

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form, with the format version in front."""
        fields = dataclasses.asdict(self)
        fields["feature_layers"] = list(self.feature_layers)
        return {"version": FORMAT_VERSION, **fields}

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> DrafterConfig:
        """Make a config from its JSON form.

        Raises:
            StreamsError: an unknown version, an unknown or missing field, or a bad value.
        """
        values = dict(fields)
        version = values.pop("version", None)
        if version != FORMAT_VERSION:
            raise StreamsError(
                f"drafter config: version {version!r} is not known, expected {FORMAT_VERSION}; "
                "a newer mlx-specstream may read it."
            )
        layer = values.get("layer")
        if isinstance(layer, Mapping):
            values["layer"] = _of_fields(LayerConfig, layer)
        made: DrafterConfig = _of_fields(cls, values)
        return made


def _of_fields(kind: Any, values: Mapping[str, Any]) -> Any:
    """Make a dataclass from fields that must be known and complete."""
    known = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - set(known)):
        raise StreamsError(
            f"drafter config: unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}."
        )
    if missing := [name for name, needed in known.items() if needed and name not in values]:
        raise StreamsError(f"drafter config: {missing[0]} is missing.")
    for field in dataclasses.fields(kind):
        if field.type == "bool" and not isinstance(values.get(field.name, False), bool):
            raise StreamsError(f"drafter config: {field.name} must be true or false.")
    return kind(**values)


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise StreamsError(f"drafter config: {name} must be {low} to {high}, got {value!r}.")
