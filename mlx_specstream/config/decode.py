"""How to decode: which tree, what is pruned, when streams run, which drafts are accepted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from ..errors import OptionError
from .streams import Mode
from .tree import TreeSpec

Schedule = Literal["auto", "inline", "deferred"]
DRAFTS = ("streams", "lookup")


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

    @classmethod
    def parse(cls, text: str) -> PruneSpec:
        """Read `8` (rows to keep) or `8:0.02` (and the threshold).

        Raises:
            OptionError: the text has neither form, or a value is out of range.
        """
        keep, colon, threshold = text.partition(":")
        try:
            return cls(int(keep), float(threshold) if colon else 0.0)
        except OptionError:
            raise
        except ValueError:
            raise OptionError(
                f"cannot read the pruning {text!r}; use '8' (rows to keep) or '8:0.02' (and the "
                "lowest probability)."
            ) from None

    def __str__(self) -> str:
        return f"{self.keep}:{self.threshold}" if self.threshold else str(self.keep)


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

    @classmethod
    def parse(cls, text: str) -> TypicalSpec:
        """Read `0.09` (epsilon) or `0.09:0.3` (epsilon and delta).

        Raises:
            OptionError: the text has neither form, or a value is out of range.
        """
        epsilon, colon, delta = text.partition(":")
        try:
            return cls(float(epsilon), float(delta) if colon else cls.delta)
        except OptionError:
            raise
        except ValueError:
            raise OptionError(
                f"cannot read the typical acceptance {text!r}; use '0.09' (epsilon) or '0.09:0.3' "
                "(epsilon and delta)."
            ) from None

    def __str__(self) -> str:
        return f"{self.epsilon:g}:{self.delta:g}"


def parse_drafts(text: str) -> tuple[str, ...]:
    """Read `streams,lookup`, one of them, or `none`.

    Raises:
        OptionError: the text has none of these forms.
    """
    words = [word.strip() for word in text.lower().replace("look-up", "lookup").split(",")]
    if words == ["none"]:
        return ()
    if not words or any(word not in DRAFTS for word in words):
        raise OptionError(
            f"cannot read the drafts {text!r}; use 'streams,lookup', 'streams', 'lookup' or 'none'."
        )
    return tuple(name for name in DRAFTS if name in words)


@dataclass(frozen=True)
class DecodeConfig:
    """How to decode: the tree, pruning, when streams run, whether parents condition candidates.

    A tree `auto` (the default) is planned if `prune` is None, within the `schedule` asked for.

    `schedule`: `inline` computes streams for every node in the verifying pass; `deferred`
    computes them for the accepted node alone, in a second short pass of the same graph
    (lossless mode only); `auto` takes `deferred` where it is possible. Inline, `stream_nodes`
    > 0 gives streams only to that many nodes, the likeliest for the accepted path to end at; a
    step that ends elsewhere drafts nothing (lossless mode only).

    `drafts`: where drafts come from, a selection of `DRAFTS`; () decodes plainly. None takes all
    there are with the tree `auto`, and streams alone with a tree that was asked for.

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
    drafts: tuple[str, ...] | None = None

    @property
    def uses_streams(self) -> bool:
        """Tell whether streams draft, where there are any."""
        return self.drafts is None or "streams" in self.drafts

    @property
    def looks_up(self) -> bool:
        """Tell whether drafts are looked up in the text."""
        return self.tree.kind == "auto" if self.drafts is None else "lookup" in self.drafts

    @property
    def lossy(self) -> bool:
        """Tell whether the text may differ from what the model says without speculation."""
        return self.typical is not None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.drafts or () if name not in DRAFTS]:
            raise OptionError(
                f"drafts come from {', '.join(map(repr, DRAFTS))}, a selection of these or none, "
                f"not from {unknown[0]!r}."
            )
        if self.stream_nodes < 0:
            raise OptionError(f"stream_nodes must be at least 0 (all), got {self.stream_nodes}.")
        if self.stream_nodes and self.schedule != "inline":
            raise OptionError("stream_nodes needs the schedule 'inline'.")
        if self.schedule not in ("auto", "inline", "deferred"):
            raise OptionError(
                f"schedule must be 'auto', 'inline' or 'deferred', got {self.schedule!r}."
            )

    @classmethod
    def of_words(
        cls,
        tree: str,
        *,
        prune: str | None = None,
        schedule: str = "auto",
        use_conditioner: bool = True,
        typical: str | None = None,
        drafts: str | None = None,
    ) -> DecodeConfig:
        """Read each part in its command-line form; the schedule is `auto`, `deferred`, `inline` or `inline:2`.

        Raises:
            OptionError: a part cannot be read or is out of range.
        """
        word, colon, count = schedule.strip().lower().partition(":")
        known = word in get_args(Schedule)
        if not known or (colon and not (word == "inline" and count.isdecimal())):
            raise OptionError(
                f"cannot read the schedule {schedule!r}; use 'auto', 'inline', 'deferred', or "
                "'inline:2' (streams at the two likeliest nodes)."
            )
        return cls(
            tree=TreeSpec.parse(tree),
            prune=None if prune is None else PruneSpec.parse(prune),
            schedule=cast(Schedule, word),
            stream_nodes=int(count or 0),
            use_conditioner=use_conditioner,
            typical=None if typical is None else TypicalSpec.parse(typical),
            drafts=None if drafts is None else parse_drafts(drafts),
        )

    @classmethod
    def parse(cls, text: str) -> DecodeConfig:
        """Read `TREE[:PRUNE] [SCHEDULE]`: `auto`, `chain3 inline`, `16:8`, `16:8:0.02 inline:2`.

        Raises:
            OptionError: a part cannot be read or is out of range.
        """
        tree_and_prune, _, schedule = text.strip().partition(" ")
        tree, colon, prune = tree_and_prune.partition(":")
        return cls.of_words(tree, prune=prune if colon else None, schedule=schedule or "auto")

    def __str__(self) -> str:
        prune = "" if self.prune is None else f":{self.prune}"
        schedule = "" if self.schedule == "auto" else f" {self.schedule}"
        return f"{self.tree}{prune}{schedule}{f':{self.stream_nodes}' if self.stream_nodes else ''}"

    def resolved_schedule(
        self, mode: Mode, *, know_next_token: bool = False
    ) -> Literal["inline", "deferred"]:
        """Return the schedule to use in `mode`; `know_next_token`: whether the streams do.

        Raises:
            OptionError: `deferred` was asked for in shared mode, where main attends its streams;
                or `inline`, for streams that know the next token.
        """
        if know_next_token and self.schedule == "inline":
            raise OptionError(
                "schedule 'inline' cannot be used with these streams: they were trained to know "
                "the next token, which is drawn after that pass; use 'deferred' or 'auto'."
            )
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
