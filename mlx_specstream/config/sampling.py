"""How tokens are drawn: mlx-lm's samplers and logits processors, with one set of bounds for everyone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import OptionError, shown
from .bounds import number, whole

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

PENALTY_CONTEXT = 20  # mlx-lm's
GREEDY_BELOW = 1e-3  # temperatures below this overflow when logits are divided by them


class Bounds(NamedTuple):
    """The values a number may have: low ≤ value ≤ high, both finite where they are given."""

    low: float | None
    high: float | None
    wanted: str
    is_whole: bool = False

    def checked(self, name: str, value: object) -> float:
        """Return the value as Python's own number.

        Raises:
            OptionError: it is none, or out of bounds.
        """
        sentence = f"{name.replace('_', '-')} must be {self.wanted}"
        if self.is_whole:
            high = None if self.high is None else int(self.high)
            return whole(value, int(self.low or 0), high, sentence)
        return number(value, self.low, self.high, sentence)


_PROBABILITY = Bounds(0, 1, "a probability")
_PENALTY = Bounds(None, None, "a number (0: off)")
_CONTEXT = Bounds(0, 2**31 - 1, "at least 0 (0: the whole text)", is_whole=True)

BOUNDS: dict[str, Bounds] = {
    "temp": Bounds(0, None, "a number of at least 0"),
    "top_p": _PROBABILITY,
    "min_p": _PROBABILITY,
    "top_k": Bounds(0, 2**31 - 1, "at least 0 (0: off)", is_whole=True),
    "min_tokens_to_keep": Bounds(1, 2**31 - 1, "at least 1", is_whole=True),
    "xtc_probability": _PROBABILITY,
    "xtc_threshold": Bounds(0, 0.5, "between 0 and 0.5"),
    "repetition_penalty": Bounds(math.ulp(0.0), None, "a number above 0 (1: off)"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_context_size": _CONTEXT,
    "presence_context_size": _CONTEXT,
    "frequency_context_size": _CONTEXT,
}


@dataclass(frozen=True)
class SamplingConfig:
    """How one answer's tokens are drawn, with mlx-lm's names and meanings.

    temp: temperature; 0 takes the likeliest token, whatever the other fields say. seed: of the
    random numbers; None draws one. logit_bias: added to the logits of token ids.

    Raises:
        OptionError: a value is out of range.
    """

    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    min_tokens_to_keep: int = 1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    repetition_context_size: int = PENALTY_CONTEXT
    presence_penalty: float = 0.0
    presence_context_size: int = PENALTY_CONTEXT
    frequency_penalty: float = 0.0
    frequency_context_size: int = PENALTY_CONTEXT
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, bounds in BOUNDS.items():
            object.__setattr__(self, name, bounds.checked(name, getattr(self, name)))
        if self.seed is not None:
            sentence = "seed must be a whole number from 0 to 2**64 - 1"
            object.__setattr__(self, "seed", whole(self.seed, 0, 2**64 - 1, sentence))
        if not isinstance(self.logit_bias, Mapping):
            raise OptionError(
                "logit-bias must say what to add to which token ids, as {id: bias}, got "
                f"{shown(self.logit_bias)}."
            )
        biases = {
            whole(token, None, None, "logit-bias names tokens by their ids"): _bias(bias)
            for token, bias in self.logit_bias.items()
        }
        object.__setattr__(self, "logit_bias", biases)

    @property
    def is_greedy(self) -> bool:
        """Tell whether the likeliest token is always taken."""
        return self.temp < GREEDY_BELOW or self.top_p == 0 or self.top_k == 1

    def sampler(self, vocab_size: int, tokenizer: TokenizerWrapper) -> Any | None:
        """Return mlx-lm's sampler, (n, V) log-probabilities to (n,) tokens; None takes the likeliest.

        Like mlx-lm, XTC spares line breaks and the tokens that end an answer.

        Raises:
            OptionError: top_k is not below the size of the vocabulary.
        """
        if self.top_k >= vocab_size and self.temp > 0:
            raise OptionError(
                f"top-k must be below the model's {vocab_size} tokens, got {self.top_k}."
            )
        if self.is_greedy:
            return None
        from mlx_lm.sample_utils import make_sampler  # late: it imports MLX

        spared: list[int] = []
        if self.xtc_probability:
            spared = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]
        return make_sampler(
            self.temp,
            self.top_p,
            self.min_p,
            self.min_tokens_to_keep,
            top_k=self.top_k,
            xtc_probability=self.xtc_probability,
            xtc_threshold=self.xtc_threshold,
            xtc_special_tokens=spared,
        )

    def processors(self, vocab_size: int | None = None) -> list[Any]:
        """Return mlx-lm's logits processors: (tokens (n,), logits (1, V)) to logits (1, V).

        vocab_size: of the model; None where the ids of `logit_bias` are known to be there.

        Raises:
            OptionError: the logit bias names a token that is not there.
        """
        for token in self.logit_bias:
            if vocab_size is not None and not 0 <= token < vocab_size:
                raise OptionError(
                    f"logit-bias names the token id {token}, but the model's ids are 0 to "
                    f"{vocab_size - 1}."
                )
        from mlx_lm.sample_utils import make_logits_processors  # late: it imports MLX

        return list(
            make_logits_processors(
                dict(self.logit_bias) or None,
                None if self.repetition_penalty == 1 else self.repetition_penalty,
                self.repetition_context_size,
                self.presence_penalty,
                self.presence_context_size,
                self.frequency_penalty,
                self.frequency_context_size,
            )
        )


def _bias(value: object) -> float:
    """Return what is added to a logit; minus infinity forbids the token."""
    if value == -math.inf:
        return -math.inf
    return number(value, None, None, "a logit bias must be a number (-inf: never this token)")
