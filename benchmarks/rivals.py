"""Ways of drafting beside each other, on one base, one text and one machine: docs/rivals.md.

    python -m benchmarks.rivals_train --data own.jsonl --output rivals     Medusa, Hydra, EAGLE, a draft model
    python -m mlx_specstream.convert.pytorch.train ...; specstream convert ...      rivals/streams, rivals/paper
    python -m benchmarks.rivals --folder rivals --results rivals.json --count
    python -m benchmarks.rivals --folder rivals --results rivals.json --cost       on a quiet machine
    python -m benchmarks.rivals --folder rivals --results rivals.json --clock      the same
    python -m benchmarks.rivals --folder rivals --results rivals.json --table docs/rivals.md

`--count`: every drafter answers the same prompts greedily, as a chain and with trees of 8 and 16 rows.
The text is the model's own whatever drafts, so all of them walk the same text; passes are counted, and
each answer is compared with plain decoding as `specstream verify` does. Counting goes on where it was
stopped, and processes may share the work by `--only`. Other drafters join by `--drafter NAME=FOLDER`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.rivals_field import TREES, Rival, entered, joined, training
from benchmarks.rivals_report import table, write_section
from benchmarks.rivals_results import Results
from benchmarks.rivals_timing import clock, costs
from mlx_specstream.bench.cases import BUILT_IN, Case, chosen_cases
from mlx_specstream.exit_status import exit_status
from mlx_specstream.loading.load import StreamModel
from mlx_specstream.machine import keep_float32_exact
from mlx_specstream.prompts import encode_prompt
from mlx_specstream.verify import Replayed, compare, replay

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

RAG = Path(__file__).with_name("rivals_rag.jsonl")
TASKS = {
    "summarize": "summarisation",
    "translate": "translation",
    "knowledge": "questions",
    "math": "maths",
    "sql": "SQL",
    "rag": "RAG",
    "chat": "chat",
}
"""Categories of the built-in prompts, and what the paper calls such a task."""


@dataclass
class Counter:
    """Answers prompts plainly once, and with drafters; counts passes and compares."""

    base: StreamModel
    tokenizer: TokenizerWrapper
    max_tokens: int
    plain: dict[str, Replayed] = field(default_factory=dict)

    def answer(self, rival: Rival, tree: str, case: Case) -> tuple[int, int, str]:
        """Return what one drafter with one tree gives on a prompt: tokens, passes, `verify`'s verdict."""
        ids = encode_prompt(self.tokenizer, case.prompt)
        if case.sha256 not in self.plain:
            own = replay(self.base, self.tokenizer, ids, self.max_tokens, None)
            self.plain[case.sha256] = own
        plain = self.plain[case.sha256]
        answer = replay(rival.model, self.tokenizer, ids, self.max_tokens, rival.config(tree))
        compared = compare(self.base, self.tokenizer, ids, plain, answer)
        return answer.stats.tokens, answer.stats.passes, compared.verdict

    def fill(self, results: Results, rivals: Sequence[Rival], cases: Sequence[Case]) -> None:
        """Count what `results` lacks: every cell's first prompt, then every cell's second ...

        cases: each task's in the same order whenever cells are filled.
        """
        places: dict[str, int] = {}
        for case in cases:
            task = TASKS.get(case.category, case.category)
            place = places[task] = places.get(task, -1) + 1
            for rival in rivals:
                rates = []
                for tree in TREES:
                    where = ("cells", rival.name, tree, task)
                    answers = results.get(*where) or []
                    if len(answers) == place:
                        answers.append(self.answer(rival, tree, case))
                        results.keep(*where, value=answers)
                    tokens, passes, _ = answers[place]
                    rates.append(f"{tokens / passes:.2f}")
                print(f"{place + 1} {task:<14} {rival.name:<22} {'  '.join(rates)}", flush=True)


def by_turns(cases: Sequence[Case], count: int) -> list[Case]:
    """Return each category's first prompt, then each one's second, up to `count` of each."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.category, []).append(case)
    rows = zip_longest(*(group[:count] for group in groups.values()))
    return [case for row in rows for case in row if case is not None]


def main() -> int:
    """Count, time or write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rivals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--folder", help="of the field's drafters")
    parser.add_argument("--drafter", action="append", default=[], metavar="NAME=FOLDER[+lookup]")
    parser.add_argument("--only", nargs="+", default=[], help="names of those that take part")
    parser.add_argument("--results", required=True, metavar="FILE", help="JSON, kept and filled")
    parser.add_argument("--count", action="store_true", help="tokens per pass, verified")
    parser.add_argument("--cost", action="store_true", help="a step's cost in plain tokens")
    parser.add_argument("--clock", action="store_true", help="wall-clock of the five best")
    parser.add_argument("--table", metavar="PAGE", help="write the section of this page")
    parser.add_argument("--prompts", nargs="+", default=[BUILT_IN, str(RAG)])
    parser.add_argument("--categories", nargs="+", default=list(TASKS))
    parser.add_argument("--num-prompts", type=int, default=4, help="of each category")
    parser.add_argument("-m", "--max-tokens", type=int, default=48)
    parser.add_argument("--minutes", type=float, default=8.0, help="limit of --cost and --clock")
    arguments = parser.parse_args()
    keep_float32_exact()
    results = Results(Path(arguments.results).expanduser())
    if arguments.table:
        write_section(Path(arguments.table), table(results.read()))
    if not (arguments.count or arguments.cost or arguments.clock):
        return 0
    words = entered(arguments.folder, arguments.drafter)
    words = {name: word for name, word in words.items() if name in (arguments.only or words)}
    rivals, base, tokenizer = joined(arguments.model, words)
    for rival in rivals:
        results.keep("parameters", rival.name, value=rival.parameters)
        results.keep("training", rival.name, value=training(words[rival.name]))
    cases = chosen_cases(arguments.prompts, arguments.categories)
    cases = by_turns(cases, arguments.num_prompts)
    if arguments.count:
        Counter(base, tokenizer, arguments.max_tokens).fill(results, rivals, cases)
    timed = (rivals, base, tokenizer, cases, arguments.max_tokens, 60 * arguments.minutes)
    if arguments.cost:
        costs(results, *timed)
    if arguments.clock:
        clock(results, *timed)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, "rivals"))
