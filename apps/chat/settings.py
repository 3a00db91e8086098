"""What `/set` and the command line choose: how tokens are drawn, drafted and counted."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ... import DecodeConfig, PruneSpec, TreeSpec, TypicalSpec
from ...config import SamplingConfig, parse_drafts
from ...errors import OptionError
from ...generation.decode_options import decode_config
from ...generation.sampling_options import sampling_config

DEFAULT_MAX_TOKENS = 1024

DecodeMode = Literal["speculative", "plain"]
Thinking = Literal["on", "off", "hidden"]


@dataclass(frozen=True)
class Settings:
    """Everything that may be changed between two answers.

    Raises:
        OptionError: a value is out of range.
    """

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    max_tokens: int = DEFAULT_MAX_TOKENS
    thinking: Thinking = "on"
    mode: DecodeMode = "speculative"
    decode: DecodeConfig = field(default_factory=DecodeConfig)

    def __post_init__(self) -> None:
        if self.max_tokens == 0 or self.max_tokens < -1:
            raise OptionError(
                f"max-tokens must be at least 1, or -1 for no limit, got {self.max_tokens}."
            )
        if self.mode not in ("speculative", "plain"):
            raise OptionError(f"mode must be speculative or plain, got {self.mode!r}.")
        if self.thinking not in ("on", "off", "hidden"):
            raise OptionError(f"thinking must be on, off or hidden, got {self.thinking!r}.")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Settings:
        """Return the settings that the command line's options describe."""
        return cls(
            sampling=sampling_config(arguments),
            max_tokens=arguments.max_tokens,
            mode="plain" if arguments.no_speculation else "speculative",
            decode=decode_config(arguments),
        )

    def changed(self, name: str, text: str) -> Settings:
        """Return the settings with one changed, as `/set name text` does it.

        Raises:
            OptionError: there is no such setting, or the text is no value of it.
        """
        key = canonical(name)
        setting = SETTINGS[key]
        try:
            return setting.change(self, text.strip().lower())
        except OptionError:
            raise
        except ValueError:
            raise OptionError(f"{key} must be {setting.wanted}, got {text!r}.") from None

    def rows(self) -> list[tuple[str, str, str]]:
        """Return name, value and meaning of every setting."""
        return [(name, s.show(self), s.wanted) for name, s in SETTINGS.items()]


@dataclass(frozen=True)
class Setting:
    """One word of `/set`: what it takes, how it changes the settings, how it is shown."""

    wanted: str
    change: Callable[[Settings, str], Settings]
    show: Callable[[Settings], str]
    values: tuple[str, ...] = ()


def _plain(name: str, read: Callable[[str], Any], wanted: str, *values: str) -> Setting:
    """Return the setting of a field of `Settings`."""

    def show(settings: Settings) -> str:
        value = getattr(settings, name)
        return "none" if value is None else str(value)

    return Setting(wanted, lambda s, text: replace(s, **{name: read(text)}), show, values)


def _sampling(name: str, read: Callable[[str], Any], wanted: str, *values: str) -> Setting:
    """Return the setting of a field of `SamplingConfig`."""

    def show(settings: Settings) -> str:
        value = getattr(settings.sampling, name)
        return "none" if value is None else str(value)

    def change(settings: Settings, text: str) -> Settings:
        return replace(settings, sampling=replace(settings.sampling, **{name: read(text)}))

    return Setting(wanted, change, show, values)


def _decode(name: str, read: Callable[[str], Any], wanted: str, *values: str) -> Setting:
    """Return the setting of a field of `DecodeConfig`."""

    def show(settings: Settings) -> str:
        value = getattr(settings.decode, name)
        if isinstance(value, bool):
            return "on" if value else "off"
        return "none" if value is None else str(value)

    def change(settings: Settings, text: str) -> Settings:
        return replace(settings, decode=replace(settings.decode, **{name: read(text)}))

    return Setting(wanted, change, show, values)


def _shown_drafts(settings: Settings) -> str:
    drafts = settings.decode.drafts
    return "auto" if drafts is None else ",".join(drafts) or "none"


def _optional(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text in ("none", "off") else read(text)


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError
    return text == "on"


SETTINGS: dict[str, Setting] = {
    "temperature": _sampling("temp", float, "a number, 0 for the likeliest token", "0", "0.7", "1"),
    "top-p": _sampling("top_p", float, "a probability, 1 for off", "1", "0.9"),
    "top-k": _sampling("top_k", int, "a whole number, 0 for off", "0", "40"),
    "min-p": _sampling("min_p", float, "a probability, 0 for off", "0", "0.05"),
    "xtc-probability": _sampling(
        "xtc_probability", float, "how often XTC is applied, 0 for off", "0", "0.5"
    ),
    "xtc-threshold": _sampling(
        "xtc_threshold", float, "XTC cuts likelier tokens, 0 to 0.5", "0.1", "0.2"
    ),
    "repetition-penalty": _sampling(
        "repetition_penalty", float, "a number above 0, 1 for off", "1", "1.1"
    ),
    "presence-penalty": _sampling("presence_penalty", float, "a number, 0 for off", "0", "0.5"),
    "frequency-penalty": _sampling("frequency_penalty", float, "a number, 0 for off", "0", "0.5"),
    "seed": _sampling("seed", _optional(int), "a whole number, or none", "none", "0"),
    "max-tokens": _plain("max_tokens", int, "a whole number, -1 for no limit", "256", "-1"),
    "thinking": _plain(
        "thinking", str, "on, off, or hidden: thoughts are not shown", "on", "off", "hidden"
    ),
    "mode": _plain("mode", str, "speculative or plain", "speculative", "plain"),
    "tree": _decode(
        "tree", TreeSpec.parse, "auto, chain, chain3, 16 (rows) or 3^4", "auto", "chain", "8", "16"
    ),
    "drafts": Setting(
        "streams,lookup, streams, lookup, none, or auto",
        lambda s, text: replace(
            s, decode=replace(s.decode, drafts=None if text == "auto" else parse_drafts(text))
        ),
        _shown_drafts,
        ("auto", "streams,lookup", "streams", "lookup", "none"),
    ),
    "prune": _decode("prune", _optional(PruneSpec.parse), "8, 8:0.02 or none", "none", "8"),
    "schedule": _decode("schedule", str, "auto, inline or deferred", "auto", "inline", "deferred"),
    "conditioning": _decode("use_conditioner", _switch, "on or off", "on", "off"),
    "lossy-typical": _decode(
        "typical",
        _optional(TypicalSpec.parse),
        "LOSSY typical acceptance, 0.09 or 0.09:0.3, or none",
        "none",
        str(TypicalSpec()),
    ),
}
"""Every setting by name, in the order they are shown."""


def canonical(name: str) -> str:
    """Return a setting's name for one of its spellings.

    Raises:
        OptionError: there is no such setting.
    """
    key = name.lower().replace("_", "-")
    key = {"temp": "temperature"}.get(key, key)
    if key not in SETTINGS:
        raise OptionError(f"there is no setting {name!r}; there are {', '.join(SETTINGS)}.")
    return key
