"""`python -m benchmarks.families`: which families of the installed mlx-lm can be decoded, tried one by one.

Of every model module of mlx-lm that the table of sizes can shrink, a tiny random model is made
and decoded with random streams, as chain and tree, beyond the edge of its windows; every token is
compared with mlx-lm's `generate_step`. The output is docs/families.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_specstream.errors import ModelError, OptionError, brief
from mlx_specstream.exit_status import exit_status
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.families.refused import REFUSED
from mlx_specstream.weights.files import atomic_file
from tests.support.against_mlx_lm import compare_with_mlx_lm
from tests.support.tiny_models import VARIANTS, family_modules, tiny_random_model

PROMPT = [3, 7, 1, 9, 4, 2, 8]
INTRODUCTION = """\
# Families of mlx-lm

For those who want to know whether their model can have streams.

Made by `python -m benchmarks.families`, with mlx-lm {mlx_lm} and mlx {mlx}, on {date}.

*Supported* means: a tiny random float32 model of the family, made by mlx-lm's own class, was
decoded with random streams as a chain and as a tree, with both schedules and pruned, {tokens}
tokens each, and every token was mlx-lm's own; sliding windows were {window} tokens wide. When a
model of your own is loaded, its logits are compared with mlx-lm's before a token is decoded, so a
model that differs from its family's tiny one is refused, never decoded wrongly.

Where layers *keep a state* (delta nets, short convolutions), drafts are chains whatever tree is
asked for, the state after every row of a draft is kept until acceptance has chosen one, and the
streams of the accepted token continue from its state and leave none; such a cache rewinds to where
a state is held (the rows of the last pass, the beginnings of the last few passes and of the
current answer), and text between there and the wanted place is computed again.

All of this was found on a CPU. On Metal mlx-lm computes such layers with kernels of its own, and one
row with other ones than a draft: state-space layers (`granitemoehybrid`) have one for a single row,
delta nets one for whole texts and one for rows that end apart. No test here has run them:
`specstream verify` with your model tells, and says so.

| family | result | drafts accepted | how it was tried, or why it is refused |
|---|---|---:|---|
"""


@dataclass(frozen=True)
class Row:
    """One family's line in the table. `result`: supported, refused, wrong or not tried."""

    family: str
    result: str
    accepted: int | None
    remark: str

    def as_markdown(self) -> str:
        """Return the line."""
        accepted = "" if self.accepted is None else str(self.accepted)
        remark = " ".join(self.remark.replace("|", "\\|").split())
        return f"| `{self.family}` | {self.result} | {accepted} | {remark} |"


def tried(name: str, max_tokens: int, sizes: Mapping[str, Any] | None = None) -> Row:
    """Return the line of one family, or of its models with these `sizes`."""
    if name in REFUSED:
        return Row(name, "refused", None, REFUSED[name])
    try:
        model = tiny_random_model(name, **(sizes or {}))
    except Exception as error:  # whatever a model class raises at a config that does not suit it
        return Row(
            name, "not tried", None, f"no tiny model: {type(error).__name__}: {brief(error)}"
        )
    try:
        found = compare_with_mlx_lm(model, PROMPT, max_tokens)
    except ModelError as error:
        reason = str(error).partition("by mlx-specstream: ")[2] or str(error)
        return Row(name, "refused", None, reason.removesuffix("; use mlx-lm itself for this one."))
    except Exception as error:  # mlx-lm's own decoding, or ours, fails: to be looked at
        return Row(
            name, "not tried", None, f"decoding fails: {type(error).__name__}: {brief(error)}"
        )
    if found.differs is not None:
        return Row(name, "**wrong**", found.accepted, found.differs)
    return Row(name, "supported", found.accepted, _remark(Backbone(model)))


def _remark(backbone: Backbone) -> str:
    """Return what is particular about a family's layers."""
    kinds = []
    windows = sum(window is not None for window in backbone.windows)
    bare = sum(call.cache is None for call in backbone.calls)
    if windows:
        kinds.append(f"{windows} of {backbone.num_layers} layers with a sliding window")
    if bare:
        kinds.append(f"{bare} without attention")
    if not backbone.is_finished:
        kinds.append("scales or soft-caps behind the head")
    ways = "chain and tree"
    if backbone.is_recurrent:
        ways = "chain"
        states = sum(call.recurrent for call in backbone.calls)
        kinds.append(f"{states} of {backbone.num_layers} layers keep a state")
    return ways + "".join(f"; {kind}" for kind in kinds)


def rows(names: Iterable[str], max_tokens: int) -> Iterator[Row]:
    """Try families one by one, and kinds of models of a family that differ in what layers do."""
    for name in names:
        yield tried(name, max_tokens)
        for models, sizes in VARIANTS.get(name, {}).items():
            row = tried(name, max_tokens, sizes)
            yield replace(row, remark=f"{models}: {row.remark}")


def build_parser() -> argparse.ArgumentParser:
    """Return the options of the study."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.families",
        description="Try every family of the installed mlx-lm and print a table, in Markdown.",
    )
    parser.add_argument("families", nargs="*", help="names of mlx-lm model modules (default: all)")
    parser.add_argument("--max-tokens", type=int, default=40, help="tokens per way of decoding")
    parser.add_argument("--output", help="write the page to this file as well, when it is complete")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the table; return 1 if a family's tokens are not mlx-lm's own."""
    from tests.support.tiny_models import WINDOW

    args = build_parser().parse_args(sys.argv[1:] if argv is None else argv)
    if args.max_tokens < 1:
        raise OptionError(f"--max-tokens must be at least 1, got {args.max_tokens}.")
    known = family_modules()
    if unknown := [name for name in args.families if name not in known]:
        raise OptionError(
            f"mlx-lm has no model module {unknown[0]!r}; name one of {', '.join(known)}."
        )
    page = INTRODUCTION.format(
        mlx_lm=importlib.metadata.version("mlx-lm"),
        mlx=importlib.metadata.version("mlx"),
        date=datetime.date.today().isoformat(),
        tokens=args.max_tokens,
        window=WINDOW,
    )
    print(page, end="", flush=True)
    wrong = False
    for row in rows(args.families or known, args.max_tokens):
        line = row.as_markdown() + "\n"
        print(line, end="", flush=True)
        page += line
        wrong |= row.result == "**wrong**"
    if args.output:
        with atomic_file(Path(args.output), if_exists="replace") as path:
            path.write_text(page, encoding="utf-8")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(exit_status(main, "families"))
