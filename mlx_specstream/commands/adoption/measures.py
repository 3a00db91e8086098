"""What finished streams give: acceptance for the planner, exactness, tokens per pass, speed.

Prompts are the held-out ones. Each measure asks as many as its seconds allow, one at least.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from ...bench.cases import chosen_cases
from ...bench.competitors import Competitors, described_model, setting_config
from ...bench.methods import MLX_LM, Method, named
from ...bench.options import TURN_TOKENS
from ...bench.result import RESULT_FILE, BenchSettings, Result
from ...bench.run import Bench, now
from ...bench.summary import summarised
from ...bench.trees import plan_costs
from ...config import DecodeConfig
from ...errors import ModelError
from ...loading.load import StreamModel
from ...machine import Machine
from ...planner.acceptance import ACCEPTANCE_FILE, AcceptanceProfile
from ...planner.record import record_answer
from ...speculation.statistics import SpeculationStats
from ...speculation.streams import Streams
from ...train.awake import awake_s
from ...train.decode_eval import TREES
from ...verify import compare, replay
from ...weights.checkpoint import load_streams
from .stages import Adoption, prompt_source

ACCEPTANCE, VERIFICATION, BENCHMARK = "acceptance", "verification", "benchmark"
TOKENS = 64
SHARES = {ACCEPTANCE: 0.25, VERIFICATION: 0.35, BENCHMARK: 0.4}
AUTO_NAME = "adopted"

T = TypeVar("T")


def joined(adoption: Adoption) -> StreamModel:
    """Return the model with its new streams."""
    model, weights = adoption.model, load_streams(adoption.made)
    weights.check_base(model.model)
    streams = Streams(model.backbone, weights.config, weights.tensors)
    return StreamModel(model.model, model.backbone, streams, model.name, str(adoption.made))


def record_acceptance(adoption: Adoption) -> None:
    """Record what is accepted on held-out prompts, for `--tree auto`."""
    state = adoption.state
    if ACCEPTANCE in state.done:
        return
    model, prompts = joined(adoption), adoption.held_out()
    streams = model.streams
    assert streams is not None
    stop = adoption.tokenizer.eos_token_ids
    with state.stage(ACCEPTANCE):
        answers = [
            record_answer(streams, prompt, TOKENS, stop)
            for prompt in _while_time(adoption, ACCEPTANCE, prompts)
        ]
        profile = AcceptanceProfile(
            streams.num_streams,
            tuple(answers),
            bool(streams.config.conditioner_rank),
            f"{len(answers)} held-out prompts",
            streams.know_next_token,
        )
        profile.save(adoption.made / ACCEPTANCE_FILE)


def verify(adoption: Adoption) -> None:
    """Compare answers with plain decoding, token for token, and count tokens per pass.

    Raises:
        ModelError: they differ by more than rounding.
    """
    state = adoption.state
    if VERIFICATION in state.done:
        return
    model, prompts = joined(adoption), adoption.held_out()
    totals = {name: SpeculationStats() for name in TREES}
    verdicts: list[str] = []
    with state.stage(VERIFICATION):
        for prompt in _while_time(adoption, VERIFICATION, prompts):
            plain = replay(model, adoption.tokenizer, prompt, TOKENS, None)
            for name, tree in TREES.items():
                run = replay(model, adoption.tokenizer, prompt, TOKENS, DecodeConfig(tree=tree))
                found = compare(model, adoption.tokenizer, prompt, plain, run)
                if found.verdict == "mismatch":
                    raise ModelError(
                        f"answers with the new streams differ from plain decoding ({found.divergence}), "
                        f"so they are not put to use; they are in {adoption.made}, please report this."
                    )
                verdicts.append(found.verdict)
                totals[name] += run.stats
        state.figures["tokens_per_pass"] = {
            name: round(stats.tokens_per_step, 3) for name, stats in totals.items()
        }
        state.figures["verified"] = {
            "answers": len(verdicts),
            "identical": verdicts.count("identical"),
            "near-tie": verdicts.count("near-tie"),
        }


def benchmark(adoption: Adoption) -> None:
    """Measure speed beside mlx-lm, both in turns, on the held-out prompts."""
    state = adoption.state
    if BENCHMARK in state.done:
        return
    folder, settings = adoption.folder / "bench", state.settings
    methods = [MLX_LM, Method("streams", tree="auto", streams=AUTO_NAME)]
    by_name = named(methods)
    limit_s = max(1.0, SHARES[BENCHMARK] * adoption.plan.measure_s)
    with state.stage(BENCHMARK):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        asked = BenchSettings(
            model=settings.model,
            adapter_path=settings.adapter_path,
            sources=[prompt_source(adoption)],
            categories=[],
            num_prompts=None,
            max_tokens=TOKENS,
            repeats=1,
            seed=0,
            draft_model=None,
            limit_s=limit_s,
            exhaustive=0,
            methods=methods,
            turn_tokens=TURN_TOKENS,
        )
        model = joined(adoption)
        configs = {n: setting_config(m) for n, m in by_name.items() if m.kind == "streams"}
        contest = Competitors(
            adoption.model, adoption.tokenizer, by_name, {AUTO_NAME: model}, configs=configs
        )
        result = Result(asked, Machine.read(), described_model(contest, settings.model), now())
        plan_costs(contest)
        bench = Bench(contest, chosen_cases(asked.sources), result, folder / RESULT_FILE)
        bench.warm_up()
        bench.measure()
        line = next(line for line in summarised(result) if line.method != MLX_LM.label)
        state.figures["bench"] = {
            "speedup": round(line.overall, 3),
            "tokens_s": round(line.tokens_s, 2),
            "tokens_per_pass": round(line.tokens_per_step, 3),
            "prompts": line.prompts,
            "identical": line.identical,
            "near-tie": line.near_ties,
            "different": line.different,
            "machine": result.machine.summary,
        }


def _while_time(adoption: Adoption, stage: str, prompts: Sequence[T]) -> Iterator[T]:
    """Yield prompts until the stage's share of the time for measuring is spent, one at least."""
    limit_s = SHARES[stage] * adoption.plan.measure_s
    since = awake_s()
    with tqdm(total=len(prompts), desc=stage, unit="", disable=None) as bar:
        for number, prompt in enumerate(prompts):
            if number and awake_s() - since > limit_s:
                return
            yield prompt
            bar.update()
