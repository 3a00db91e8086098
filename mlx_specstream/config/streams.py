"""What was trained: the streams of one base model, as `streams_config.json` describes them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import StreamsError

FORMAT_VERSION = 1
AUTO = "auto"
"""What `--streams` takes to mean: adopted ones, the model folder's, or those shipped for the base."""
MAX_STREAMS = 32

Mode = Literal["lossless", "shared"]
RopeOffset = Literal["position_plus_stream", "position"]


@dataclass(frozen=True)
class StreamConfig:
    """The trained streams of one base model [SS §3.1].

    `num_streams` is γ, `num_msa_layers` is N_s. A rank of 0 means that the part does not exist.
    The LoRA product is scaled by `lora_alpha / lora_rank`. `value_rotation` is ε of [SS Eq. 9].
    Streams with a `next_token_rank` know x_{t+1} from their start on, and so run only once it is
    drawn. `conditioner_tokens`: how many tokens before a candidate the conditioner sees, 1 or 2.

    Raises:
        StreamsError: a value is out of range or of the wrong type.
    """

    num_streams: int
    num_msa_layers: int
    mode: Mode = "lossless"
    rope_offset: RopeOffset = "position_plus_stream"
    stream_init_rank: int = 0
    lora_rank: int = 0
    lora_alpha: float = 0.0
    target_modules: tuple[str, ...] = ()
    value_rotation: float = 0.0
    pruner_rank: int = 0
    conditioner_rank: int = 0
    conditioner_hidden: int = 0
    next_token_rank: int = 0
    conditioner_tokens: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.target_modules, list | tuple):
            raise StreamsError("streams config: target_modules must be a list of module names.")
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for name in _INTEGERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise StreamsError(f"streams config: {name} must be an integer, got {value!r}.")
            low = 1 if name in ("num_streams", "num_msa_layers", "conditioner_tokens") else 0
            if value < low:
                raise StreamsError(f"streams config: {name} must be at least {low}, got {value}.")
        for name in ("lora_alpha", "value_rotation"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < math.inf:
                raise StreamsError(f"streams config: {name} must be a number >= 0, got {value!r}.")
        if self.num_streams > MAX_STREAMS:
            raise StreamsError(
                f"streams config: num_streams must be at most {MAX_STREAMS}, "
                f"got {self.num_streams}."
            )
        if self.mode not in ("lossless", "shared"):
            raise StreamsError(
                f"streams config: mode must be 'lossless' or 'shared', got {self.mode!r}."
            )
        if self.rope_offset not in ("position_plus_stream", "position"):
            raise StreamsError(
                "streams config: rope_offset must be 'position_plus_stream' or 'position', "
                f"got {self.rope_offset!r}."
            )
        if not all(isinstance(name, str) and name for name in self.target_modules):
            raise StreamsError("streams config: target_modules must be a list of module names.")
        if len(set(self.target_modules)) < len(self.target_modules):
            raise StreamsError("streams config: target_modules names a module twice.")
        if bool(self.lora_rank) != bool(self.target_modules):
            raise StreamsError(
                "streams config: lora_rank and target_modules go together, got "
                f"lora_rank {self.lora_rank} with {len(self.target_modules)} modules."
            )
        if bool(self.conditioner_rank) != bool(self.conditioner_hidden):
            raise StreamsError(
                "streams config: conditioner_rank and conditioner_hidden go together, got "
                f"{self.conditioner_rank} and {self.conditioner_hidden}."
            )
        if self.conditioner_tokens > (2 if self.conditioner_rank else 1):
            raise StreamsError(
                "streams config: conditioner_tokens must be 1, or 2 with a conditioner, got "
                f"{self.conditioner_tokens}."
            )
        if self.next_token_rank and self.mode == "shared":
            raise StreamsError(
                "streams config: next_token_rank needs mode 'lossless': in shared mode a token is "
                "drawn from a row that has seen its streams, which cannot know it yet."
            )

    @property
    def lora_scale(self) -> float:
        """Factor on the LoRA product, alpha / rank (0 without adapters)."""
        return self.lora_alpha / self.lora_rank if self.lora_rank else 0.0

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form, with the format version in front."""
        fields = dataclasses.asdict(self)
        fields["target_modules"] = list(self.target_modules)
        return {"version": FORMAT_VERSION, **fields}

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> StreamConfig:
        """Make a config from its JSON form.

        Raises:
            StreamsError: an unknown version, an unknown or missing field, or a bad value.
        """
        version = fields.get("version")
        if version != FORMAT_VERSION:
            raise StreamsError(
                f"streams config: version {version!r} is not known, expected {FORMAT_VERSION}; "
                "a newer mlx-specstream may read it."
            )
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known - {"version"})
        if unknown:
            raise StreamsError(
                f"streams config: unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}."
            )
        for name in ("num_streams", "num_msa_layers"):
            if name not in fields:
                raise StreamsError(f"streams config: {name} is missing.")
        values = {name: value for name, value in fields.items() if name != "version"}
        return cls(**values)  # type: ignore[arg-type]


_INTEGERS = tuple(
    name for name, annotation in StreamConfig.__annotations__.items() if annotation in ("int", int)
)
