"""The proof: does the converted folder compute what PyTorch computes from the source?

PyTorch runs the source checkpoint in float32 (`torch_reference.py`), MLX the finished folder. On every probe
prompt MLX decodes greedily; PyTorch reads prompt and answer in one pass and is asked what it would
have said at each position: if all agree, it would have said the same text on its own.

    compared at the last prompt token   hidden state where streams start, main and stream logits
    compared along the answer           every token, every draft of every step
    compared for every tensor, field    what was written against what PyTorch reads (`check_weights.py`)

Rounding to 16 bits or fewer could hide a small mistake. So the same conversion is also run in
float32, in memory, and must agree to float32's rounding, token for token; and every number written
must be PyTorch's, rounded to its type, or within its quantisation step. What the folder itself
computes must be within the precision of 16 bits, and is told of a quantised base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..errors import OptionError
from ..weights.tensorfile import FLOATS
from .check_runs import probe_prompts, trace_folder, trace_plan
from .plan import ConversionPlan, make_plan

LOGIT_BOUNDS = {"F32": 1e-2, "F16": 0.1, "BF16": 1.0}
"""Largest error of a logit that rounding explains, where logits spread over some ten units."""
NEAR_TIE = 1e-3
"""Two float32 logits closer than this may change places."""
DRAFTS_APART = 0.1
"""Share of drafts that may be others in 16 bit: candidates are often near ties, and only drafts."""


@dataclass
class Findings:
    """Everything compared, over all probes."""

    errors: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    wrong_tokens: list[float] = field(default_factory=list)
    drafts: int = 0
    wrong_drafts: list[float] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    beyond: list[str] = field(default_factory=list)

    def error(self, what: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Keep the largest error of a kind; NaN and infinity are beyond every bound."""
        largest = float(np.abs(ours - theirs).max()) if ours.size else 0.0
        if not math.isfinite(largest):
            self.beyond.append(f"the {what} hold NaN or infinite values")
            largest = math.inf
        self.errors[what] = max(self.errors.get(what, 0.0), largest)

    def is_within(self, bound: float, gap: float) -> bool:
        """Say whether logits differ by at most `bound`, and tokens only where PyTorch's logits do by `gap`."""
        logits = max(self.errors.get(f"{name} logits", 0.0) for name in ("main", "stream"))
        return logits <= bound and max(self.wrong_tokens, default=0.0) <= gap

    @property
    def is_exact(self) -> bool:
        """Say whether all differences are float32's rounding."""
        drafts_apart = max(self.wrong_drafts, default=0.0)
        return self.is_within(LOGIT_BOUNDS["F32"], NEAR_TIE) and drafts_apart <= NEAR_TIE


class Proof:
    """Runs the comparison on a finished folder; `figures` fills it, `report` and `passed` tell."""

    def __init__(self, plan: ConversionPlan) -> None:
        if not plan.writes_base:
            raise OptionError("--check needs the base model as well; leave out --adapter-only.")
        from .torch_reference import TorchReference

        self.plan = plan
        self.torch_reference = TorchReference(plan)
        self.findings = Findings()
        options = replace(plan.options, dtype="float32", stream_dtype="float32", quantisation=None)
        self.exact_plan = plan if _is_float32(plan) else make_plan(options)
        self.exact = self.findings if self.exact_plan is plan else Findings()

    def figures(self, folder: Path) -> dict[str, str]:
        """Compare, and return the figures for the model card."""
        from .check_weights import compare_configs, compare_streams, compare_weights

        compare_configs(self.plan, folder, self.findings)
        compare_weights(self.plan, self.exact_plan, self.torch_reference, folder, self.findings)
        compare_streams(self.plan, self.torch_reference, folder, self.findings)
        prompts = probe_prompts(folder, self.plan)
        traces = trace_folder(folder, prompts)
        for prompt, ours in zip(prompts, traces, strict=True):
            self.torch_reference.compare(prompt, ours, self.findings)
        if self.exact is not self.findings:
            for prompt, ours in zip(prompts, trace_plan(self.exact_plan, prompts), strict=True):
                self.torch_reference.compare(prompt, ours, self.exact)
        return self.rows()

    @property
    def kind(self) -> str:
        """F32, F16, BF16, or "quantised": what the conversion made of the base.

        A base that was quantised before is copied, and must compute what its numbers say.
        """
        assert self.plan.base is not None
        if self.plan.options.quantisation is not None:
            return "quantised"
        kinds = {spec.dtype for tensor in self.plan.base.tensors for spec in tensor.outputs}
        return next((kind for kind in ("BF16", "F16") if kind in kinds), "F32")

    @property
    def passed(self) -> bool:
        """Whether every difference is explained by the type and quantisation asked for."""
        found = self.findings
        if found.beyond or self.exact.beyond or not self.exact.is_exact:
            return False
        if self.kind in ("quantised", "F32"):
            return True
        bound = LOGIT_BOUNDS[self.kind]
        few_apart = len(found.wrong_drafts) <= DRAFTS_APART * found.drafts
        return found.is_within(bound, 2 * bound) and few_apart

    def rows(self) -> dict[str, str]:
        """Return what was found, for people: what -> figure."""
        found = self.findings
        rows = {f"largest error, {what}": f"{value:.2e}" for what, value in found.errors.items()}
        for what, total, wrong in (
            ("greedy tokens", found.tokens, found.wrong_tokens),
            ("drafts", found.drafts, found.wrong_drafts),
        ):
            apart = f"; PyTorch's logits there differ by up to {max(wrong):.2e}" if wrong else ""
            rows[f"{what} as in PyTorch"] = f"{total - len(wrong)} of {total}{apart}"
        if self.exact is not found:
            rows |= {
                f"largest error in float32, {what}": f"{value:.2e}"
                for what, value in self.exact.errors.items()
            }
        for group, value in sorted(found.weights.items()):
            rows[f"largest weight error, {group}"] = f"{value:.2e}"
        return rows

    def report(self) -> str:
        """Return the table and the verdict."""
        rows = self.rows()
        width = max(map(len, rows))
        lines = [f"  {name.ljust(width)}  {value}" for name, value in rows.items()]
        if beyond := [*self.findings.beyond, *self.exact.beyond]:
            verdict = f"FAILED: {beyond[0]}"
        elif not self.exact.is_exact:
            verdict = "FAILED: in float32 the weights compute something else than PyTorch"
        elif self.kind == "quantised":
            verdict = "passed: every weight is within its quantisation step of the source"
        elif self.passed:
            verdict = f"passed: the same as PyTorch within {self.kind} rounding"
        else:
            verdict = f"FAILED: differences beyond what {self.kind} rounding explains"
        return "\n".join(["check against PyTorch:", *lines, verdict])


def _is_float32(plan: ConversionPlan) -> bool:
    """Say whether a plan rounds nothing: every float is float32, and none becomes packed."""
    return all(
        spec.dtype == "F32" or (spec.dtype not in FLOATS and not tensor.parts)
        for tensor in plan.tensors()
        for spec in tensor.outputs
    )
