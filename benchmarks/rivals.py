"""Drafters beside each other: how many tokens a pass they give on the model's own text.

Every drafter decodes the same prompts greedily, as a chain and with trees of 8 and 16 rows. The
text is the model's own whatever drafts, so all of them walk the same text; passes are counted, not
timed. All share one base in memory.

    python -m benchmarks.rivals --model demo --drafter streams=demo-chat --drafter medusa=out/medusa \
        --drafter eagle=out/eagle --prompts built-in -m 96
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlx.utils import tree_flatten

from mlx_specstream.bench.cases import BUILT_IN, Case, chosen_cases
from mlx_specstream.config import DecodeConfig, TreeSpec
from mlx_specstream.exit_status import exit_status
from mlx_specstream.generation.generate import stream_generate
from mlx_specstream.loading.drafter import drafter_in, is_trained_drafter
from mlx_specstream.loading.load import StreamModel, load
from mlx_specstream.prompts import encode_prompt
from mlx_specstream.speculation.streams import Streams
from mlx_specstream.weights.drafter import load_drafter
from mlx_specstream.weights.shipped import find_streams

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

TREES = ("chain", "8", "16")
LOOK_UP = "lookup"  # as a drafter's name: the text alone; after a `+`, beside that drafter


@dataclass
class Counted:
    """Tokens and passes of one drafter with one tree, by category."""

    tokens: dict[str, int] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)

    def add(self, category: str, tokens: int, passes: int) -> None:
        """Add an answer."""
        self.tokens[category] = self.tokens.get(category, 0) + tokens
        self.passes[category] = self.passes.get(category, 0) + passes

    def rate(self, category: str | None = None) -> float:
        """Return the tokens per pass of one category, or of all."""
        if category is not None:
            return self.tokens[category] / self.passes[category]
        return sum(self.tokens.values()) / sum(self.passes.values())


@dataclass(frozen=True)
class Rival:
    """A drafter joined to the model. parameters: those it adds."""

    name: str
    model: StreamModel
    parameters: int
    drafts: tuple[str, ...]


def joined(name: str, words: Sequence[str]) -> tuple[list[Rival], TokenizerWrapper]:
    """Load each NAME=FOLDER over one base; `+lookup` behind the folder adds look-up.

    Raises:
        SpecStreamError: a folder cannot be loaded.
    """
    base, tokenizer = load(name, streams=None)
    rivals = []
    for word in words:
        called, _, rest = word.partition("=")
        place, plus, _ = rest.partition("+")
        drafts = ("streams", "lookup") if plus else ("streams",)
        if place in ("", LOOK_UP):
            rivals.append(Rival(called, base, 0, ("lookup",)))
            continue
        path = Path(place).expanduser()
        if is_trained_drafter(path):
            model = replace(base, drafter=drafter_in(path, base.model, base.backbone))
            tensors = load_drafter(path).tensors
        elif (path / "config.json").is_file():
            model, _ = load(name, draft_model=path)
            tensors = dict(tree_flatten(load(place, streams=None)[0].model.parameters()))
        else:
            weights = find_streams(place, base.model, Path())
            assert weights is not None
            streams = Streams(base.backbone, weights.config, weights.tensors)
            model, tensors = replace(base, streams=streams), weights.tensors
        size = sum(tensor.size for key, tensor in tensors.items() if key != "d2t")
        rivals.append(Rival(called, model, size, drafts))
    return rivals, tokenizer


def count(
    rival: Rival, tokenizer: TokenizerWrapper, cases: Sequence[Case], tree: str, max_tokens: int
) -> Counted:
    """Decode all cases with one drafter and one tree."""
    found = Counted()
    config = DecodeConfig(TreeSpec.parse(tree), drafts=rival.drafts)
    for case in cases:
        ids = encode_prompt(tokenizer, case.prompt)
        *_, last = stream_generate(rival.model, tokenizer, ids, max_tokens, config=config)
        found.add(case.category, last.stats.tokens, last.stats.passes)
    return found


def table(
    rivals: Sequence[Rival], tokenizer: TokenizerWrapper, cases: Sequence[Case], max_tokens: int
) -> list[str]:
    """Return the table's lines: parameters, tokens a pass by tree, and by category with 8 rows."""
    categories = list(dict.fromkeys(case.category for case in cases))
    head = ["drafter", "parameters", *TREES, *categories]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for rival in rivals:
        counted = {tree: count(rival, tokenizer, cases, tree, max_tokens) for tree in TREES}
        rates = [f"{counted[tree].rate():.2f}" for tree in TREES]
        by_category = [f"{counted['8'].rate(category):.2f}" for category in categories]
        cells = [rival.name, f"{rival.parameters:,}", *rates, *by_category]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main() -> int:
    """Count and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals", description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--drafter", action="append", required=True, metavar="NAME=FOLDER[+lookup]")
    parser.add_argument("--prompts", default=BUILT_IN, help="as specstream bench takes them")
    parser.add_argument("--categories", nargs="+", default=[])
    parser.add_argument("--num-prompts", type=int, default=3, help="of each category")
    parser.add_argument("-m", "--max-tokens", type=int, default=96)
    arguments = parser.parse_args()
    cases = chosen_cases([arguments.prompts], arguments.categories, arguments.num_prompts)
    rivals, tokenizer = joined(arguments.model, arguments.drafter)
    print("\n".join(table(rivals, tokenizer, cases, arguments.max_tokens)))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, "rivals"))
