"""PyTorch's side of the proof: the source checkpoint in float32, read by other eyes where possible.

The base is loaded by transformers from its own folder if that is a plain Hugging Face folder; else
(GGUF, a lone .pt file, wrapped names) from our reader's tensors. Needs the extra `torch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckpointError, OptionError
from .names import Named
from .plan import Plan
from .reverse import pytorch_name
from .steps import materialise, plain_dtype

if TYPE_CHECKING:
    import torch

    from .check import Findings, Trace


class Oracle:
    """The PyTorch reference of a plan's source.

    Raises:
        OptionError: torch is missing, or the base is quantised.
        CheckpointError: the reference does not know this family.
    """

    def __init__(self, plan: Plan) -> None:
        try:
            import torch
            import transformers  # noqa: F401
        except ImportError:
            raise OptionError(
                "--check runs the source in PyTorch; install mlx-specstream[torch], or leave it"
                " out."
            ) from None
        from .pytorch.adapters import StreamAdapters
        from .pytorch.backbone import Backbone
        from .pytorch.model import SpeculativeModel

        assert plan.origin is not None
        if "quantization" in (plan.origin.config or {}):
            raise OptionError("--check needs a base in full weights, and this one is quantised.")
        self.torch = torch
        model = _base_model(plan)
        try:
            self.backbone = Backbone(model.float().eval().requires_grad_(False))
        except ValueError as error:
            raise CheckpointError(f"--check cannot run this base in PyTorch: {error}.") from None
        self.model = None
        if plan.trained is not None:
            config, named = plan.trained
            adapters = StreamAdapters(config, self.backbone)
            _load_adapters(adapters, named)
            self.model = SpeculativeModel(self.backbone, adapters.eval().requires_grad_(False))

    def compare(self, prompt: list[int], ours: Trace, findings: Findings) -> None:
        """Read prompt and MLX's answer in one pass, and note where PyTorch would differ."""
        torch, P, n = self.torch, len(prompt), len(ours.tokens)
        ids = torch.tensor([[*prompt, *ours.tokens[:-1]]])
        with torch.no_grad():
            if self.model is None:
                logits = self.backbone.model(ids).logits[0]
                findings.error("main logits", ours.main, _numpy(logits[P - 1]))
            else:
                at = torch.arange(P - 1, P + n - 1)
                out = self.model.forward(ids, at=at, following=torch.tensor([ours.tokens]))
                logits = self.backbone.head(out.main[0])
                first = self.backbone.head(out.streams[0, 0])
                findings.error("hidden state", ours.insertion, _numpy(out.insertion[0, P - 1]))
                findings.error("main logits", ours.main, _numpy(logits[P - 1]))
                findings.error("stream logits", ours.streams, _numpy(first))
                for root, drafts in ours.steps:
                    if root < P + n:
                        text = [*prompt, *ours.tokens]
                        states = out.streams[0, root - P]
                        self._compare_drafts(states, text[root - 1 : root + 1], drafts, findings)
        for row, token in enumerate(ours.tokens):
            findings.tokens += 1
            scores = logits[P - 1 + row]
            if int(scores.argmax()) != token:
                findings.wrong_tokens.append(float(scores.max() - scores[token]))

    def _compare_drafts(
        self, states: torch.Tensor, path: list[int], drafts: list[int], findings: Findings
    ) -> None:
        """Compare one step's chain with what these stream states (γ, h) propose after `path`.

        path: the root, and the token before it.
        """
        torch = self.torch
        assert self.model is not None
        conditioner = self.model.adapters.conditioner
        head = self.backbone.head(states)
        for level, draft in enumerate(drafts):
            scores = head[level]
            allowed = torch.arange(scores.shape[-1])
            if conditioner is not None:
                allowed = scores.topk(min(32, scores.shape[-1])).indices
                before, parent = self.backbone.embed(torch.tensor(path[-2:]))[:, None]
                state = states[level][None]
                change = conditioner(parent, state, before) - state
                scores = scores + (change @ self.backbone.head_weight.t())[0]
            best = allowed[scores[allowed].argmax()]
            findings.drafts += 1
            if int(best) != draft:
                findings.wrong_drafts.append(max(0.0, float(scores[best] - scores[draft])))
            path = [*path, draft]


def _base_model(plan: Plan) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    assert plan.origin is not None
    assert plan.base is not None
    folder = plan.origin.folder
    plain = plan.origin.path.is_dir() and all(
        tensor.origin.name.startswith(("model", "pytorch_model"))
        and tensor.origin.suffix != ".gguf"
        for tensor in plan.origin.tensors.values()
    )
    try:
        if plain and not plan.options.rules:
            return AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False
            )
        fields = {name: value for name, value in plan.base.config.items() if "quantiz" not in name}
        config = AutoConfig.for_model(**fields)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        state = {name: _tensor(named) for name, named in _sources(plan).items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        unexplained = [name for name in missing if "lm_head" not in name]
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"--check cannot load this base in PyTorch: {reason}.") from None
    if unexplained or unexpected:
        raise CheckpointError(
            f"--check cannot load this base in PyTorch: {[*unexplained, *unexpected][0]} differs."
        )
    model.tie_weights()
    return model


def _sources(plan: Plan) -> Mapping[str, Named]:
    assert plan.base is not None
    steps = plan.base.steps
    return {step.outputs[0].name: step.source for step in steps if step.source is not None}


def _load_adapters(adapters: Any, named: Mapping[str, Named]) -> None:
    """Fill the reference's parameters from the source tensors, in the orientation they came in."""
    from .pytorch.checkpoint import checkpoint_name

    given = {}
    for name, each in named.items():
        given[pytorch_name(name)[0]] = Named(name, each.sources)
    for name, parameter in adapters.named_parameters():
        wanted = checkpoint_name(name)
        if wanted not in given:
            raise CheckpointError(
                f"--check: the PyTorch reference wants {wanted}, which is missing."
            )
        parameter.data.copy_(_tensor(given.pop(wanted)))
    if given:
        raise CheckpointError(f"--check: the PyTorch reference does not know {min(given)}.")


def _tensor(named: Named) -> torch.Tensor:
    """Return a source tensor as torch float32."""
    import torch

    bits = materialise(named)
    if plain_dtype(named) == "BF16":
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(np.ascontiguousarray(bits)).float()


def _numpy(values: torch.Tensor) -> np.ndarray:
    return values.float().numpy()
