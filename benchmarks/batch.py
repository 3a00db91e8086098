"""Several requests in one pass against the same requests in turn: is the whole faster?

    python -m benchmarks.batch --model demo --streams demo-chat --batch 4

Every group of prompts is answered by every method, round after round, in an order that rotates,
so that a slow moment hits all of them alike. Time runs from the first prompt to the last token
of the group, prompts included; answers are greedy and must be the same whatever shares the batch.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_specstream.batch.generation import batch_generate
from mlx_specstream.config import DecodeConfig, TreeSpec
from mlx_specstream.errors import OptionError, StreamsError
from mlx_specstream.exit_status import exit_status
from mlx_specstream.generation.generate import stream_generate
from mlx_specstream.loading.load import StreamModel, load
from mlx_specstream.machine import Machine
from mlx_specstream.prompts import built_in_prompts, encode_prompt, read_prompts
from mlx_specstream.verify import first_difference, judge, reference_logits

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Answers = list[list[int]]  # token ids per prompt
Group = list[list[int]]  # prompts
Method = Callable[[Group], tuple[Answers, int]]  # to answers and the passes they took


@dataclass
class Line:
    """One method's figures: seconds and tokens of every group it answered, in order."""

    method: str
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Return tokens per second of all groups together."""
        return sum(self.tokens) / sum(self.seconds)

    def against(self, other: Line) -> float:
        """Return the median of how much faster this method was than `other`, group by group."""
        pairs = zip(self.seconds, self.tokens, other.seconds, other.tokens, strict=True)
        return statistics.median((n / s) / (m / t) for s, n, t, m in pairs)


@dataclass(frozen=True)
class Difference:
    """A token that differs from the same request alone; `explained`: by a rounding near-tie."""

    prompt: int
    position: int
    gap: float
    explained: bool


def methods(
    model: StreamModel,
    tokenizer: TokenizerWrapper,
    batch: DecodeConfig,
    trees: Sequence[str],
    N: int,
) -> dict[str, Method]:
    """Return what competes, by name."""
    import mlx_lm

    def together(
        prompts: Group, speculative: bool, config: DecodeConfig = batch
    ) -> tuple[Answers, int]:
        found = batch_generate(
            model,
            tokenizer,
            prompts,
            N,
            config=config,
            speculative=speculative,
            completion_batch_size=len(prompts),
        )
        return found.token_ids, found.stats.steps

    def in_turn(prompts: Group, config: DecodeConfig | None) -> tuple[Answers, int]:
        answers, passes = [], 0
        for prompt in prompts:
            options: dict[str, Any] = {"config": config, "speculative": config is not None}
            responses = list(stream_generate(model, tokenizer, prompt, N, **options))
            answers.append([response.token for response in responses])
            passes += responses[-1].stats.passes
        return answers, passes

    def mlx_lm_batch(prompts: Group) -> tuple[Answers, int]:
        found = mlx_lm.batch_generate(
            model.model, tokenizer, prompts, max_tokens=N, return_token_ids=True
        )
        # It counts the end-of-turn token, but does not return it.
        ended = [[*ids, tokenizer.eos_token_id] if len(ids) < N else ids for ids in found.token_ids]
        return ended, max(map(len, ended))

    planned = replace(batch, tree=TreeSpec(kind="auto"))  # drafts where that pays

    def with_tree(tree: str) -> Method:
        config = replace(batch, tree=TreeSpec.parse(tree))
        return lambda prompts: in_turn(prompts, config)

    return {
        "in one batch": lambda prompts: together(prompts, True, planned),
        f"in one batch, {batch.tree}": lambda prompts: together(prompts, True),
        **{f"in turn, tree {tree}": with_tree(tree) for tree in trees},
        "in one batch, plain": lambda prompts: together(prompts, False),
        "in turn, plain": lambda prompts: in_turn(prompts, None),
        "mlx_lm.batch_generate": mlx_lm_batch,
    }


def measure(
    competing: dict[str, Method],
    groups: Sequence[Group],
    rounds: int,
    show: Callable[[str], None],
) -> tuple[list[Line], dict[str, list[Answers]]]:
    """Answer every group by every method `rounds` times and return figures and answers."""
    lines = {name: Line(name) for name in competing}
    answers: dict[str, list[Answers]] = {name: [] for name in competing}
    for run in competing.values():
        run([prompt[:] for prompt in groups[0]])  # warm up
    names = list(competing)
    for turn in range(rounds):
        for place, group in enumerate(groups):
            first = (turn + place) % len(names)
            for name in names[first:] + names[:first]:
                gc.collect()
                mx.clear_cache()
                mx.synchronize()
                begun = time.perf_counter()
                found, steps = competing[name](group)
                mx.synchronize()
                line = lines[name]
                line.seconds.append(time.perf_counter() - begun)
                line.tokens.append(sum(map(len, found)))
                line.steps.append(steps)
                if turn == 0:
                    answers[name].append(found)
                speed = line.tokens[-1] / line.seconds[-1]
                show(f"round {turn + 1}, group {place + 1}: {name}: {speed:.1f} tokens/s")
    return list(lines.values()), answers


def differences(
    model: StreamModel,
    tokenizer: TokenizerWrapper,
    groups: Sequence[Group],
    found: Sequence[Answers],
    alone: Sequence[Answers],
) -> list[Difference]:
    """Compare the batch's answers with those of each request alone.

    A difference is explained where the reference's top two logits are closer than rounding.
    """
    result = []
    prompts = [prompt for group in groups for prompt in group]
    together = [answer for answers in found for answer in answers]
    by_itself = [answer for answers in alone for answer in answers]
    for number, (prompt, a, b) in enumerate(zip(prompts, together, by_itself, strict=True)):
        position = first_difference(b, a)
        if position is None:
            continue
        logits = reference_logits(model, tokenizer, prompt, b, position)
        ours, theirs = (x[position] if position < len(x) else -1 for x in (a, b))
        verdict = judge(logits, model.backbone.dtype, position, theirs, ours)
        result.append(Difference(number, position, verdict.gap, verdict.near_tie))
    return result


def table(lines: Sequence[Line], reference: Line) -> str:
    """Return the figures as a Markdown table."""
    rows = ["| method | tokens/s | against in turn | tokens per pass |", "|---|---|---|---|"]
    rows += [
        f"| {line.method} | {line.tokens_per_s:.1f} | {line.against(reference):.2f}x | "
        f"{sum(line.tokens) / sum(line.steps):.2f} |"
        for line in lines
    ]
    return "\n".join(rows)


def build_parser() -> argparse.ArgumentParser:
    """Return the options of `python -m benchmarks.batch`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.batch",
        description="Requests in one batch against the same requests in turn, interleaved.",
    )
    parser.add_argument("--model", default="demo", help="model folder, hub id, or 'demo'")
    parser.add_argument("--streams", default="auto", help="stream folder, hub id or shipped name")
    parser.add_argument("--batch", type=int, default=4, help="requests at a time (default: 4)")
    parser.add_argument("--groups", type=int, default=2, help="groups of prompts (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (default: 3)")
    parser.add_argument("--max-tokens", type=int, default=96, help="per answer (default: 96)")
    parser.add_argument("--prompts", help="file of prompts (default: the built-in ones)")
    parser.add_argument("--chain", default="chain", help="the batch's drafts (default: chain)")
    parser.add_argument(
        "--tree",
        action="append",
        help="tree of requests in turn, repeatable; the first is the reference (default: chain, 5)",
    )
    parser.add_argument("--schedule", default="auto", choices=("auto", "inline", "deferred"))
    parser.add_argument(
        "--drafts", help="where drafts come from (default: as in specstream generate)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 if an answer differs from the one alone, near-ties aside."""
    arguments = build_parser().parse_args(argv)
    for name in ("batch", "groups", "rounds", "max_tokens"):
        if getattr(arguments, name) < 1:
            raise OptionError(f"--{name.replace('_', '-')} must be at least 1.")
    config = DecodeConfig.of_words(
        arguments.chain, schedule=arguments.schedule, drafts=arguments.drafts
    )
    streams = None if arguments.streams.lower() == "none" else arguments.streams
    model, tokenizer = load(arguments.model, streams=streams)
    if model.streams is None and not config.looks_up:
        raise StreamsError(
            f"there are no streams for {arguments.model}; name some with --streams, or let drafts be "
            "looked up with --drafts lookup."
        )
    prompts = read_prompts(arguments.prompts) if arguments.prompts else built_in_prompts()
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    size = arguments.batch
    groups = [ids[at : at + size] for at in range(0, min(len(ids), size * arguments.groups), size)]
    if len(groups[-1]) < size:
        groups.pop()
    if not groups:
        raise OptionError(f"--batch {size} needs that many prompts, and there are {len(ids)}.")
    competing = methods(
        model, tokenizer, config, arguments.tree or ["chain", "5"], arguments.max_tokens
    )
    progress = sys.stderr
    lines, answers = measure(
        competing, groups, arguments.rounds, lambda text: print(text, file=progress, flush=True)
    )
    reference = lines[1]
    differing = differences(
        model, tokenizer, groups, answers["in one batch"], answers["in turn, plain"]
    )
    same = sum(map(len, groups)) - len(differing)
    if arguments.json:
        record = {
            "machine": asdict(Machine.read()),
            "options": vars(arguments),
            "lines": [
                {
                    **asdict(line),
                    "tokens_per_s": line.tokens_per_s,
                    "against_in_turn": line.against(reference),
                }
                for line in lines
            ],
            "same_answers": same,
            "differences": [asdict(difference) for difference in differing],
        }
        print(json.dumps(record))
    else:
        print(table(lines, reference))
        print(f"\n{same} of {sum(map(len, groups))} answers are those of the request alone.")
        for difference in differing:
            word = "a near-tie" if difference.explained else "NOT explained by rounding"
            print(
                f"prompt {difference.prompt}, token {difference.position}: {word}, "
                f"top-two logit gap {difference.gap:.3g}"
            )
    return 0 if all(difference.explained for difference in differing) else 1


if __name__ == "__main__":
    sys.exit(exit_status(main, "batch"))
