"""What was trained (`StreamConfig`) and how to decode with it (`TreeSpec`, `DecodeConfig`).

Frozen and validated when made: a config that exists is a config that makes sense on its own.
Whether it fits a particular base model is checked where the two meet (`streams.py`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .errors import OptionError, StreamsError

FORMAT_VERSION = 1
MAX_STREAMS = 32

Mode = Literal["lossless", "shared"]
RopeOffset = Literal["position_plus_stream", "position"]
Schedule = Literal["auto", "inline", "deferred"]
TreeKind = Literal["auto", "chain", "best", "product"]


@dataclass(frozen=True)
class StreamConfig:
    """The trained streams of one base model [SS §3.1].

    `num_streams` is γ, `num_msa_layers` is N_s. A rank of 0 means that the part does not exist.
    The LoRA product is scaled by `lora_alpha / lora_rank`. `value_rotation` is ε of [SS Eq. 9].

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

    def __post_init__(self) -> None:
        if not isinstance(self.target_modules, list | tuple):
            raise StreamsError("streams config: target_modules must be a list of module names.")
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for name in _INTEGERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise StreamsError(f"streams config: {name} must be an integer, got {value!r}.")
            low = 1 if name in ("num_streams", "num_msa_layers") else 0
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


@dataclass(frozen=True)
class TreeSpec:
    """The shape of the draft trees: how many rows a step verifies, and how they are spread.

    * `auto`: what the planner finds best on this machine for this text, plain decoding included
      (`plan/`); where nothing plans, it is `best`.
    * `chain`: one path of `depth` drafts, rows = depth + 1.
    * `best`: the `rows` nodes (root included) of highest cumulative probability.
    * `product`: the paper's static tree, `branching` candidates of every stream under every
      node [SS §3.1.2]; rows = 1 + branching + branching² + ...

    `depth` 0 means as deep as there are streams. `branching` is how many of a stream's best
    candidates are considered without regard to their parent. The default is five rows: Apple's
    matrix kernels read the weights once for up to five, so these drafts are the cheapest.

    Raises:
        OptionError: a value is out of range.
    """

    kind: TreeKind = "best"
    rows: int = 5
    branching: int = 8
    depth: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "chain", "best", "product"):
            raise OptionError(f"tree kind must be auto, chain, best or product, got {self.kind!r}.")
        if not 1 <= self.rows <= 1024:
            raise OptionError(f"a tree has 1 to 1024 rows, got {self.rows}.")
        if not 1 <= self.branching <= 64:
            raise OptionError(f"a tree node has 1 to 64 candidates, got {self.branching}.")
        if not 0 <= self.depth <= MAX_STREAMS:
            raise OptionError(f"tree depth must be 0 to {MAX_STREAMS}, got {self.depth}.")

    @classmethod
    def parse(cls, text: str) -> TreeSpec:
        """Read the command-line form: `auto`, `chain`, `chain3`, `16` (rows, best-first) or `3^4`.

        Raises:
            OptionError: the text has none of these forms.
        """
        word = text.strip().lower()
        if word == "auto":
            return cls(kind="auto")
        if match := re.fullmatch(r"chain(\d+)?", word):
            return cls(kind="chain", branching=1, depth=int(match[1] or 0))
        if word.isdecimal() and len(word) < 6:
            return cls(kind="best", rows=int(word))
        if (match := re.fullmatch(r"(\d{1,3})\^(\d{1,2})", word)) and int(match[2]) > 0:
            return cls(kind="product", branching=int(match[1]), depth=int(match[2]))
        raise OptionError(
            f"cannot read the tree {text!r}; use 'auto', 'chain', 'chain3' (three drafts), "
            "'16' (the best 16 rows) or '3^4' (three candidates of each of four streams)."
        )

    def __str__(self) -> str:
        if self.kind == "auto":
            return "auto"
        if self.kind == "chain":
            return f"chain{self.depth or ''}"
        if self.kind == "product":
            return f"{self.branching}^{self.depth or 'γ'}"
        return str(self.rows)

    def level_widths(self, num_streams: int) -> tuple[int, ...]:
        """Return how many nodes each level holds, before the best `rows` of all are picked.

        A beam of rows − 1 nodes per level is exact for best-first trees: no level of the best
        `rows` nodes can hold more. A level holds fewer where there are fewer candidates.

        Raises:
            OptionError: a product tree of more than 1024 rows.
        """
        depth = min(self.depth or num_streams, num_streams)
        if self.kind == "chain":
            return (1,) * depth
        if self.kind in ("auto", "best"):
            return (self.rows - 1,) * depth if self.rows > 1 else ()
        widths = tuple(self.branching ** (level + 1) for level in range(depth))
        if sum(widths) >= 1024:
            raise OptionError(
                f"the tree {self} has {sum(widths) + 1} rows; at most 1024 are allowed."
            )
        return widths

    def num_nodes(self, num_streams: int) -> int:
        """Return the rows of a full tree, root included."""
        if self.kind in ("auto", "best"):
            return self.rows if num_streams else 1
        return 1 + sum(self.level_widths(num_streams))


@dataclass(frozen=True)
class PruneSpec:
    """Early-exit pruning [SS §3.1.3]: at most `keep` rows go on into the MSA layers.

    `threshold` is the paper's rule: a child whose early-exit probability given its parent is
    below it is dropped with its descendants. `keep` is fixed, so that shapes stay static.

    Raises:
        OptionError: a value is out of range.
    """

    keep: int
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise OptionError(f"pruning keeps at least 1 row (the root), got {self.keep}.")
        if not 0.0 <= self.threshold <= 1.0:
            raise OptionError(f"the pruning threshold is a probability, got {self.threshold}.")


@dataclass(frozen=True)
class TypicalSpec:
    """Typical acceptance, which is lossy: drafts are taken that the target did not draw.

    A draft is typical, and taken, when its probability p after what precedes it has

        p > min(epsilon, delta * exp(-entropy))

    after Medusa (Cai et al., 2024, §2.3.1): probable, or not improbable where the model is
    unsure. Where several drafts are, the likeliest is taken; where none is, the target's own
    draw decides. p and the entropy (in nats) are those of the processed logits at temperature 1.
    The text is a plausible one, but not drawn from the model's distribution.

    Raises:
        OptionError: a value is out of range.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise OptionError(
                    f"typical acceptance: {name} must be above 0 and at most 1, got {value}."
                )

    def __str__(self) -> str:
        return f"{self.epsilon:g}:{self.delta:g}"


@dataclass(frozen=True)
class DecodeConfig:
    """How to decode: the tree, pruning, when streams run, whether parents condition candidates.

    A tree `auto` (the default) is planned if `prune` is None, within the `schedule` asked for.

    `schedule`: `inline` computes streams for every node in the verifying pass; `deferred`
    computes them for the accepted node alone, in a second short pass of the same graph
    (lossless mode only); `auto` takes `deferred` where it is possible. Inline, `stream_nodes`
    > 0 gives streams only to that many nodes, the likeliest for the accepted path to end at; a
    step that ends elsewhere drafts nothing (lossless mode only).

    `typical`: None decodes exactly what the model would say; a `TypicalSpec` is lossy.

    Raises:
        OptionError: a value is out of range, or `stream_nodes` without the schedule `inline`.
    """

    tree: TreeSpec = field(default_factory=lambda: TreeSpec(kind="auto"))
    prune: PruneSpec | None = None
    schedule: Schedule = "auto"
    use_conditioner: bool = True
    stream_nodes: int = 0
    typical: TypicalSpec | None = None

    @property
    def lossy(self) -> bool:
        """Tell whether the text may differ from what the model says without speculation."""
        return self.typical is not None

    def __post_init__(self) -> None:
        if self.stream_nodes < 0:
            raise OptionError(f"stream_nodes must be at least 0 (all), got {self.stream_nodes}.")
        if self.stream_nodes and self.schedule != "inline":
            raise OptionError("stream_nodes needs the schedule 'inline'.")
        if self.schedule not in ("auto", "inline", "deferred"):
            raise OptionError(
                f"schedule must be 'auto', 'inline' or 'deferred', got {self.schedule!r}."
            )

    def resolved_schedule(self, mode: Mode) -> Literal["inline", "deferred"]:
        """Return the schedule to use in `mode`.

        Raises:
            OptionError: `deferred` was asked for in shared mode, where main attends its streams.
        """
        if mode == "shared":
            if self.stream_nodes:
                raise OptionError(
                    "stream_nodes needs lossless streams: in shared mode the main stream attends "
                    "its streams, so every node has its own."
                )
            if self.schedule == "deferred":
                raise OptionError(
                    "schedule 'deferred' needs lossless streams: in shared mode the main stream "
                    "attends its streams, so they must run in the same pass; use 'inline'."
                )
            return "inline"
        return "deferred" if self.schedule == "auto" else self.schedule


@dataclass(frozen=True)
class CacheConfig:
    """How a new KV cache holds its rows, with mlx-lm's names and meanings.

    max_kv_size: layers without a sliding window hold the last so many rows, the first four
    always among them; None for all. kv_bits: store rows in so many bits, a scale and a bias per
    `kv_group_size` channels, from `quantized_kv_start` rows on; None for unquantised.

    Raises:
        OptionError: a value is out of range, or both are asked for.
    """

    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000

    def __post_init__(self) -> None:
        if self.max_kv_size is not None and self.max_kv_size <= 4:
            raise OptionError(
                f"max_kv_size must be above 4, for the first 4 rows stay, got {self.max_kv_size}."
            )
        if self.kv_bits is not None and self.kv_bits not in (2, 3, 4, 5, 6, 8):
            raise OptionError(f"kv_bits must be 2, 3, 4, 5, 6 or 8, got {self.kv_bits}.")
        if self.kv_group_size not in (32, 64, 128):
            raise OptionError(f"kv_group_size must be 32, 64 or 128, got {self.kv_group_size}.")
        if self.quantized_kv_start < 0:
            raise OptionError(
                f"quantized_kv_start must be at least 0, got {self.quantized_kv_start}."
            )
        if self.max_kv_size is not None and self.kv_bits is not None:
            raise OptionError(
                "max_kv_size and kv_bits cannot be used together: mlx-lm does not quantise "
                "rotating caches; leave one of them out."
            )
