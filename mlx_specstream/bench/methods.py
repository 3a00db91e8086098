"""What competes in a benchmark: ways of decoding the same model, and their settings.

mlx-lm       mlx_lm.stream_generate itself: the reference of outputs and the denominator of speed-ups
plain        our loop without speculation
streams      Speculative Streaming with a tree, pruning, a schedule and streams
draft-model  mlx-lm's speculative decoding with a second, smaller model
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal

from ..errors import DataError, OptionError

Kind = Literal["mlx-lm", "plain", "streams", "draft-model"]
KINDS = ("mlx-lm", "plain", "streams", "draft-model")
_SETTING = (
    "tree=16 prune=8:0.02 schedule=deferred conditioning=no streams=NAME drafts=streams,lookup"
)


@dataclass(frozen=True)
class Method:
    """One way of decoding; which fields count depends on `kind`.

    tree, prune, schedule, conditioning: as on the command line. streams: a name for all
    categories, then names for single ones: `demo-chat,sql=demo-sql`, or `none`. drafts: where they
    come from, as on the command line.
    """

    kind: Kind
    tree: str = ""
    prune: str | None = None
    schedule: str = "auto"
    conditioning: bool = True
    streams: str = ""
    num_draft_tokens: int = 0
    drafts: str | None = None

    @property
    def label(self) -> str:
        """Return its name without the streams."""
        if self.kind == "plain":
            return "plain, ours"
        if self.kind == "draft-model":
            return f"draft-model {self.num_draft_tokens}"
        if self.kind == "mlx-lm":
            return "mlx-lm"
        words = [f"tree {self.tree}"]
        if self.prune:
            words.append(f"pruned {self.prune}")
        if self.schedule != "auto":
            words.append(self.schedule)
        if not self.conditioning:
            words.append("unconditioned")
        if self.drafts is not None:
            words.append(f"drafts {self.drafts}")
        return ", ".join(words)

    @property
    def ours(self) -> bool:
        """Tell whether its output must be the reference's."""
        return self.kind in ("plain", "streams")

    def streams_for(self, category: str) -> str:
        """Return the name of the streams that serve a category."""
        default, by_category = parse_streams(self.streams)
        return by_category.get(category, default)

    @classmethod
    def from_dict(cls, values: object) -> Method:
        """Make one from its JSON form.

        Raises:
            DataError: it is none.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not set(values) <= known:
            raise DataError("the file is no result of specstream bench: a method is unreadable.")
        if values.get("kind") not in KINDS:
            raise DataError(f"the method {values.get('kind')!r} is not known to this version.")
        return cls(**values)

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        return asdict(self)


MLX_LM = Method("mlx-lm")


def named(methods: list[Method]) -> dict[str, Method]:
    """Return methods by name; streams are named where several sets compete.

    Raises:
        OptionError: a method occurs twice.
    """
    several = len({method.streams for method in methods if method.kind == "streams"}) > 1
    found: dict[str, Method] = {}
    for method in methods:
        with_streams = several and method.kind == "streams"
        name = f"{method.label} ({method.streams})" if with_streams else method.label
        if name in found:
            raise OptionError(f"the setting '{name}' is named twice; name each once.")
        found[name] = method
    return found


def parse_streams(text: str) -> tuple[str, dict[str, str]]:
    """Read `demo-chat,sql=demo-sql`: the streams for all categories, and those for single ones.

    Raises:
        OptionError: there is none for the categories that are not named.
    """
    default, by_category = "", {}
    for word in (word.strip() for word in text.split(",")):
        category, equals, name = word.partition("=")
        if equals and category.strip() and name.strip():
            by_category[category.strip()] = name.strip()
        elif word and not equals and not default:
            default = word
        else:
            raise OptionError(
                f"cannot read the streams {text!r}; name a set for all categories and, after "
                "commas, others for single ones: 'demo-chat,sql=demo-sql'."
            )
    if not default:
        raise OptionError(
            f"the streams {text!r} leave other categories without; begin with a set for all."
        )
    return default, by_category


def parse_setting(text: str, streams: str) -> Method:
    """Read a `--setting`: words like `tree=16`, separated by blanks.

    Raises:
        OptionError: a word is not known.
    """
    values: dict[str, str] = {}
    for word in text.split():
        key, _, value = word.partition("=")
        if (
            key not in ("tree", "prune", "schedule", "conditioning", "streams", "drafts")
            or not value
        ):
            raise OptionError(f"cannot read {word!r} in a setting; write like '{_SETTING}'.")
        values[key] = value
    if values.get("conditioning", "yes") not in ("yes", "no"):
        raise OptionError(f"conditioning is yes or no, got {values['conditioning']!r}.")
    return Method(
        "streams",
        tree=_tree(values),
        prune=values.get("prune"),
        schedule=values.get("schedule", "auto"),
        conditioning=values.get("conditioning", "yes") == "yes",
        streams=values.get("streams", streams),
        drafts=values.get("drafts"),
    )


def _tree(values: Mapping[str, str]) -> str:
    if "tree" not in values:
        raise OptionError(f"a setting needs a tree; write like '{_SETTING}'.")
    return values["tree"]
