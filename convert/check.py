"""The proof: does the converted folder compute what PyTorch computes from the source?

PyTorch runs the source checkpoint in float32 (`torch_reference.py`), MLX the finished folder. On every probe
prompt MLX decodes greedily; PyTorch reads prompt and answer in one pass and is asked what it would
have said at each position: if all agree, it would have said the same text on its own.

    compared at the last prompt token   hidden state where streams start, main and stream logits
    compared along the answer           every token, every draft of every step
    compared for every tensor           what was written (dequantised) against its source

The verdict takes into account what was asked for: float32 must agree to rounding and token for
token, 16 bit within its precision, and a quantised base may differ, but each of its weights only by
its quantisation step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import DecodeConfig, TreeSpec
from ..errors import OptionError
from ..model.backbone import Backbone
from ..model.cache import KVCache
from ..speculation.drafters import StreamDrafter
from ..speculation.drafting import StreamDecoder
from ..speculation.result import MaxTokens
from ..speculation.sampling import TokenSampler
from ..speculation.streams import Streams
from ..speculation.tree import root_only
from ..weights.checkpoint import load_streams
from ..weights.tensorfile import to_mlx
from .plan import ConversionPlan

PROMPTS = (
    "Why is the sky blue?",
    "List three uses of a paper clip.",
    "Write a short note to a friend who is ill.",
    "def add(a, b):",
)
NUM_TOKENS = 64
LOGIT_BOUNDS = {"F32": 1e-2, "F16": 0.1, "BF16": 1.0}
"""Largest error of a logit that rounding explains, where logits spread over some ten units."""
NEAR_TIE = 1e-3
"""Two float32 logits closer than this may change places."""
DRAFTS_APART = 0.1
"""Share of drafts that may be others in 16 bit: candidates are often near ties, and only drafts."""
ROUNDING = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8}
"""Half a unit in the last place, relative."""


@dataclass(frozen=True)
class Trace:
    """What one side computed for one probe.

    insertion: (h,), main: (V,), streams: (γ, V), all at the last prompt token, float32.
    tokens: the greedy answer. steps: (position of the root in the text, its drafts) of each step.
    """

    insertion: np.ndarray
    main: np.ndarray
    streams: np.ndarray
    tokens: list[int]
    steps: list[tuple[int, list[int]]]


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
        """Keep the largest error of a kind."""
        largest = float(np.abs(ours - theirs).max()) if ours.size else 0.0
        self.errors[what] = max(self.errors.get(what, 0.0), largest)


class Proof:
    """Runs the comparison on a finished folder; `figures` fills it, `report` and `passed` tell."""

    def __init__(self, plan: ConversionPlan) -> None:
        if not plan.writes_base:
            raise OptionError("--check needs the base model as well; leave out --adapter-only.")
        from .torch_reference import TorchReference

        self.plan = plan
        self.torch_reference = TorchReference(plan)
        self.findings = Findings()

    def figures(self, folder: Path) -> dict[str, str]:
        """Compare, and return the figures for the model card."""
        compare_weights(self.plan, folder, self.findings)
        prompts = probe_prompts(folder, self.plan)
        for prompt, ours in zip(prompts, trace_mlx(folder, prompts), strict=True):
            self.torch_reference.compare(prompt, ours, self.findings)
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
        if found.beyond:
            return False
        if self.kind == "quantised":
            return True
        bound = LOGIT_BOUNDS[self.kind]
        logits = max(found.errors.get(f"{name} logits", 0.0) for name in ("main", "stream"))
        gap = NEAR_TIE if self.kind == "F32" else 2 * bound
        if logits > bound or max(found.wrong_tokens, default=0.0) > gap:
            return False
        if self.kind == "F32":
            return max(found.wrong_drafts, default=0.0) <= gap
        return len(found.wrong_drafts) <= DRAFTS_APART * found.drafts

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
        for group, value in sorted(found.weights.items()):
            rows[f"largest weight error, {group}"] = f"{value:.2e}"
        return rows

    def report(self) -> str:
        """Return the table and the verdict."""
        rows = self.rows()
        width = max(map(len, rows))
        lines = [f"  {name.ljust(width)}  {value}" for name, value in rows.items()]
        if self.findings.beyond:
            verdict = f"FAILED: {self.findings.beyond[0]}"
        elif self.kind == "quantised":
            verdict = "passed: every weight is within its quantisation step of the source"
        elif self.passed:
            verdict = f"passed: the same as PyTorch within {self.kind} rounding"
        else:
            verdict = f"FAILED: differences beyond what {self.kind} rounding explains"
        return "\n".join(["check against PyTorch:", *lines, verdict])


def probe_prompts(folder: Path, plan: ConversionPlan) -> list[list[int]]:
    """Return the probes as token ids; random ids of fixed seed where there is no tokenizer."""
    assert plan.base is not None
    if any(name.startswith("tokenizer") for name in plan.files):
        from mlx_lm.utils import load_tokenizer

        tokenizer = load_tokenizer(folder)
        if tokenizer.chat_template is None:
            return [tokenizer.encode(text) for text in PROMPTS]
        chats = [[{"role": "user", "content": text}] for text in PROMPTS]
        return [
            list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
            for chat in chats
        ]
    V = int(plan.base.config["vocab_size"])
    generator = np.random.default_rng(0)
    return [generator.integers(0, V, 16).tolist() for _ in PROMPTS]


def trace_mlx(folder: Path, prompts: Sequence[list[int]]) -> list[Trace]:
    """Decode the probes with the finished folder: greedy, chains of all streams."""
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    if not (folder / "streams_config.json").exists():
        return [_trace_plain(model, prompt) for prompt in prompts]
    weights = load_streams(folder)
    weights.check_base(model)
    streams = Streams(Backbone(model), weights.config, weights.tensors)
    return [_trace_streams(streams, prompt) for prompt in prompts]


def _trace_streams(streams: Streams, prompt: list[int]) -> Trace:
    config = DecodeConfig(tree=TreeSpec(kind="chain", branching=1))
    decoder = StreamDecoder(streams, config, TokenSampler(), keep_drafts=True)
    cache = KVCache(streams.backbone.num_layers)
    decoder.prefill(prompt[:-1], cache)
    look = StreamDrafter(streams, inline=True)
    root = root_only(mx.array([prompt[-1]]))
    alone = replace(look, inline=False).verify(root, cache)
    following = mx.argmax(streams.backbone.head(alone.last)[0], axis=-1)
    seen = look.verify(root, cache, following)
    assert seen.streams is not None
    normed = streams.backbone.norm(seen.streams)[0, 0]
    heads = [streams.backbone.head(x)[0] for x in (seen.last, normed[None])]
    main, stream_logits = _floats(heads[0][0]), _floats(heads[1])
    insertion = _floats(seen.first[0, 0])

    tokens: list[int] = []
    steps: list[tuple[int, list[int]]] = []
    for result in decoder.steps(prompt[-1], cache, MaxTokens()):
        if result.draft is not None and len(result.draft.tokens) > 1:
            steps.append((len(prompt) + len(tokens) - 1, result.draft.tokens[1:]))
        tokens += result.tokens
        if len(tokens) >= NUM_TOKENS:
            break
    return Trace(insertion, main, stream_logits, tokens[:NUM_TOKENS], steps)


def _trace_plain(model: nn.Module, prompt: list[int]) -> Trace:
    """Decode greedily with mlx-lm's model itself, where there are no streams."""
    ids, main = list(prompt), np.zeros(0)
    for count in range(NUM_TOKENS // 4):
        logits = _floats(model(mx.array([ids]))[0, -1])
        main = logits if count == 0 else main
        ids.append(int(logits.argmax()))
    nothing = np.zeros((0, main.size), np.float32)
    return Trace(np.zeros(0, np.float32), main, nothing, ids[len(prompt) :], [])


def _floats(values: mx.array) -> np.ndarray:
    return np.array(values.astype(mx.float32))


def compare_weights(plan: ConversionPlan, folder: Path, findings: Findings) -> None:
    """Compare every base tensor as written, dequantised, with its source.

    A copied tensor must be the same, a cast one within its rounding, a quantised one within a step
    of its group (a step is the scale; for the floating modes, half the largest value).
    """
    assert plan.base is not None
    written: dict[str, mx.array] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        loaded = mx.load(str(path))
        written |= loaded if isinstance(loaded, dict) else {}
    modules = dict(plan.base.model.named_modules())
    for tensor in plan.base.tensors:
        if not tensor.sources or "merge LoRA" in tensor.operations:
            continue
        name, read = tensor.name, plan.base.sources[tensor.name]
        source = to_mlx(read.read(), read.dtype)
        if source.dtype not in (mx.float32, mx.float16, mx.bfloat16):
            if not mx.array_equal(written.pop(name), source):
                findings.beyond.append(f"{name} differs from its source")
            continue
        source = source.astype(mx.float32)
        value, bound = written.pop(name), mx.abs(source) * ROUNDING.get(tensor.dtype, 0.0)
        if tensor.parts:
            parts = [written.pop(spec.name) for spec in tensor.parts[1:]]
            module = modules[name.rpartition(".")[0]]
            size, bits, mode = module.group_size, module.bits, module.mode
            biases = parts[1] if len(parts) > 1 else None
            value = mx.dequantize(value, parts[0], biases, size, bits, mode)
            step_size = mx.abs(parts[0].astype(mx.float32)) if mode == "affine" else None
            if step_size is None:
                grouped = mx.abs(source).reshape(*source.shape[:-1], -1, size)
                step_size = grouped.max(axis=-1) / 2
            bound = mx.repeat(step_size, size, axis=-1) * 1.05 + mx.abs(source) * 2.0**-6
        error = mx.abs(value.astype(mx.float32) - source)
        group = re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight"))
        largest = float(_floats(error.max()))
        findings.weights[group] = max(findings.weights.get(group, 0.0), largest)
        if (error > bound + 2.0**-24).any().item():
            findings.beyond.append(f"{name} differs from its source by {largest:.2e}")
