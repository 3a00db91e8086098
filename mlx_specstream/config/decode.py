"""How to decode: which tree, what is pruned, when streams run, which drafts are accepted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..errors import OptionError
from .streams import Mode
from .tree import TreeSpec

Schedule = Literal["auto", "inline", "deferred"]


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
