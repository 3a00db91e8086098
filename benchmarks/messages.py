"""What a message between processes costs, and what speculation gains where messages are slow.

    python -m benchmarks.messages --output messages.json

Two processes on this machine decode the demo model together, sharded (with even heads,
`even_heads.py`), while every message of the ring leaves late by a delay (`late.c`). For every delay
the planner measures its cost curve as it always does and chooses a setting; then answers are
decoded plainly, with that setting, and with the one chosen without a delay: a few tokens of each in
turns, all delays in turns as well. What they say must be the same.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.even_heads import make_even
from benchmarks.pages import set_section
from mlx_specstream.bench.measure import in_turns, ours
from mlx_specstream.config import DecodeConfig
from mlx_specstream.errors import ModelError
from mlx_specstream.exit_status import exit_status
from mlx_specstream.loading.load import StreamModel, load
from mlx_specstream.machine import Machine, ranks
from mlx_specstream.machine.load import Watch, busy_sentence
from mlx_specstream.planner import Forecast, acceptance, chosen, forecasts, measure, model_plans
from mlx_specstream.planner.messages import message_s, messages_per_pass
from mlx_specstream.prompts import built_in_prompts, encode_prompt
from tests.support.together import launch

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

DELAYS_US = (0, 50, 200, 1000)
MIN_TOKENS = 8
TITLE = "What slow messages do"
INTRODUCTION = """\
`python -m benchmarks.messages`: two processes on one machine decode the demo model, sharded, while every sum over both
of them is made late by a delay. The planner measures and chooses for each delay anew; then a few tokens of every
method's answer are decoded in turns, all delays in turns too, and all say the same. Gains are over plain decoding
with the same delay: the median of the prompts and their quartiles."""
TURN = 8  # tokens of an answer before the next method's turn


@dataclass
class Delayed:
    """What was found with one delay. Lists have an entry per prompt; speed-ups are over plain."""

    delay_us: int
    message_us: float
    messages: int
    plain_ms: float
    choice: str
    step_in_tokens: float
    expected: float
    plain_tokens_per_s: list[float] = field(default_factory=list)
    speedup: list[float] = field(default_factory=list)
    speedup_of_undelayed: list[float] = field(default_factory=list)
    tokens_per_pass: list[float] = field(default_factory=list)


def set_delay(delay_us: float) -> None:
    """Let every sum over all processes take so many microseconds longer, in this process's part.

    The ring sums in 2(N - 1) messages that wait for each other.
    """
    each = delay_us * 1000 / (2 * (ranks.count() - 1))
    ctypes.c_long.in_dll(ctypes.CDLL(None), "message_delay_ns").value = round(each)


def compiled(folder: Path) -> Path:
    """Compile `late.c` into a library to be loaded before all others."""
    late, source = folder / "late.so", Path(__file__).with_name("late.c")
    compiler = ["cc", "-shared", "-fPIC", "-O2", "-o", str(late), str(source), "-ldl"]
    subprocess.run(compiler, check=True)
    return late


def plan(model: StreamModel, delay_us: int, budget_s: float) -> tuple[Delayed, Forecast]:
    """Measure steps with a delay, as `planner_for` does, and return what the planner chooses."""
    assert model.streams is not None
    set_delay(delay_us)
    profile = acceptance(model)
    curve = measure(
        model.streams,
        model_plans(model),
        budget_s=budget_s,
        tokens_per_step=profile.tokens_per_step,
        clock=ranks.clock,
    )
    if curve is None:
        raise ModelError("the model computes NaN; use another.")
    best = chosen(forecasts(curve, profile))
    found = Delayed(
        delay_us,
        1e6 * message_s(model.backbone),
        messages_per_pass(model.backbone),
        1e3 * curve.plain.seconds,
        best.name,
        best.seconds_per_step / curve.plain.seconds,
        best.speedup,
    )
    return found, best


def ask(
    model: StreamModel,
    tokenizer: TokenizerWrapper,
    prompt: list[int],
    max_tokens: int,
    rows: Sequence[Delayed],
    choices: Sequence[Forecast],
) -> None:
    """Have one prompt answered with every delay by every method, and note the speed-ups."""
    for row, choice in zip(rows, choices, strict=True):
        set_delay(row.delay_us)
        methods = [
            None if c.plan is None else c.plan.config(DecodeConfig()) for c in (choice, choices[0])
        ]
        answers = [
            ours(model, tokenizer, prompt, max_tokens, config) for config in (None, *methods)
        ]
        in_turns(answers, TURN)
        plain, own, undelayed = (answer.answered for answer in answers)
        if own.tokens != plain.tokens or undelayed.tokens != plain.tokens:
            raise ModelError("speculation changed an answer, which is a fault; please report it.")
        if len(plain.tokens) < MIN_TOKENS:
            continue  # too short to time
        row.plain_tokens_per_s.append((len(plain.tokens) - 1) / plain.decode_s)
        row.speedup.append(plain.decode_s / own.decode_s)
        row.speedup_of_undelayed.append(plain.decode_s / undelayed.decode_s)
        row.tokens_per_pass.append(len(own.tokens) / max(1, own.passes))


def work(options: argparse.Namespace) -> int:
    """Be one of the processes; the leader writes what was found."""
    begun = ranks.clock()
    model, tokenizer = load(options.model, streams=options.streams, pipeline=options.pipeline)
    delays = [int(word) for word in options.delays.split(",")]
    rows, choices = zip(
        *(plan(model, delay, options.plan_seconds) for delay in delays), strict=True
    )
    prompts = [encode_prompt(tokenizer, one) for one in built_in_prompts()]
    longest = 0.0
    for prompt in prompts:
        started = ranks.clock()
        if longest and started - begun + longest > options.seconds:
            break
        ask(model, tokenizer, prompt, options.max_tokens, rows, choices)
        longest = max(longest, ranks.clock() - started)
    set_delay(0)
    if not ranks.is_follower():
        found = {"processes": ranks.count(), "pipeline": options.pipeline}
        found["rows"] = [asdict(row) for row in rows]
        Path(options.output).write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


def table(found: dict[str, Any]) -> str:
    """Return what was found as Markdown."""
    lines = [
        "| added to a sum | a sum takes | plain tokens/s | planner's choice | a step costs | tokens a "
        "pass | gain expected | gain measured | of the choice without a delay |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['delay_us']} µs | {row['message_us']:.0f} µs | "
            f"{statistics.median(row['plain_tokens_per_s']):.1f} | {row['choice']} | "
            f"{row['step_in_tokens']:.2f} tokens | {statistics.median(row['tokens_per_pass']):.2f} | "
            f"{row['expected']:.2f} | {_spread(row['speedup'])} | "
            f"{_spread(row['speedup_of_undelayed'])} |"
        )
    first = found["rows"][0]
    way = "in stages" if found["pipeline"] else "sharded"
    lines.append(
        f"\n{len(first['speedup'])} prompts, {found['processes']} processes, {way}: {first['messages']} "
        f"sums a pass. {found['machine']}, {found['date']}"
        + (f"; {found['busy']}" if found["busy"] else ", a quiet machine.")
    )
    return "\n".join(lines)


def _children_s() -> float:
    """Return the seconds that the processes started here have computed, once they have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def build_parser() -> argparse.ArgumentParser:
    """Return the options of `python -m benchmarks.messages`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.messages")
    parser.add_argument("--model", help="model folder (default: the demo model with even heads)")
    parser.add_argument("--streams", help="its streams")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pipeline", action="store_true", help="divide the model by layers")
    parser.add_argument("--delays", default=",".join(map(str, DELAYS_US)), help="microseconds")
    parser.add_argument("--max-tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--plan-seconds", type=float, default=12.0, help="for each cost curve")
    parser.add_argument("--seconds", type=float, default=300.0, help="for all of it")
    parser.add_argument("--output", default="messages.json", help="the JSON file to write")
    parser.add_argument(
        "--page", type=Path, help="put the table into this page, docs/distributed.md"
    )
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes, and print the table."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = build_parser().parse_args(words)
    if options.part:
        return work(options)
    watch, before, begun = Watch(), _children_s(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            model, streams = make_even(Path(folder))
            words += ["--model", str(model), "--streams", str(streams)]
        preloaded = f"{compiled(Path(folder))} {os.environ.get('LD_PRELOAD', '')}".strip()
        ended = launch(
            options.processes,
            ["-m", "benchmarks.messages", "--part", *words],
            timeout=600 + 2 * options.seconds,
            environment={"LD_PRELOAD": preloaded},
        )
    others = watch.other_cores - (_children_s() - before) / (time.monotonic() - begun)
    if any(status for status, _, _ in ended):
        print(*(errors for _, _, errors in ended), file=sys.stderr)
        return 1
    path = Path(options.output)
    machine = Machine.read()
    found = json.loads(path.read_text("utf-8")) | {
        "machine": f"{machine.chip}, MLX {machine.mlx}",
        "date": time.strftime("%Y-%m-%d"),
        "busy": busy_sentence(others, os.cpu_count() or 1),
    }
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(table(found))
    if options.page is not None:
        set_section(options.page, TITLE, f"{INTRODUCTION}\n\n{table(found)}", "What was tried")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, "messages"))
