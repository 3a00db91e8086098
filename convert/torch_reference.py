"""PyTorch's side of the proof: the source checkpoint in float32, read by PyTorch's own readers.

    files      torch.load(weights_only=True), safetensors' own reader; GGUF, which neither reads, by ours
    base       transformers' own model of the source's config.json, filled by name
    streams    the PyTorch reference (`pytorch/model.py`) with the tensors as they are in their files

Only where a tensor is (file and name in it) comes from the conversion: no value, no split, no
transposition and no LoRA scale does. Needs the extra `torch`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckpointError, OptionError, brief, shown
from .plan import ConversionPlan, Source
from .reverse import pytorch_name
from .tensors import Tensor

if TYPE_CHECKING:
    import torch

    from .check import Findings, Trace
    from .pytorch.backbone import TorchBackbone
    from .pytorch.model import SpeculativeModel

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class TorchReference:
    """A plan's source in PyTorch.

    Raises:
        OptionError: torch is missing, or the base is quantised.
        CheckpointError: the reference does not know this family, or PyTorch cannot read the source.
    """

    def __init__(self, plan: ConversionPlan) -> None:
        try:
            import torch
            import transformers  # noqa: F401
        except ImportError:
            raise OptionError(
                "--check runs the source in PyTorch; install mlx-specstream[torch], or leave it"
                " out."
            ) from None
        from .pytorch.backbone import TorchBackbone

        assert plan.source is not None
        if "quantization" in (plan.source.checkpoint.config or {}):
            raise OptionError("--check needs a base in full weights, and this one is quantised.")
        self.torch = torch
        try:
            model = _base_model(plan.source)
            self.backbone = TorchBackbone(model.float().eval().requires_grad_(False))
            self.model = _stream_model(self.backbone, plan.source)
        except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
            if isinstance(error, OptionError):
                raise
            raise CheckpointError(
                f"--check cannot run this checkpoint in PyTorch: {brief(error)}."
            ) from None

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


class TorchFiles:
    """The tensors of files, read by PyTorch or safetensors, one file in memory at a time."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._tensors: Mapping[str, torch.Tensor] = {}

    def read(self, tensor: Tensor) -> torch.Tensor:
        """Return the tensor that is in a file, float32, before anything is done to it."""
        import torch

        path, name = tensor.sources[0]
        if path.suffix == ".gguf":
            return torch.from_numpy(np.ascontiguousarray(tensor.read()))
        if path != self._path:
            self._path, self._tensors = path, _load(path)
        names = [name, name.removeprefix("conditioner."), f"conditioner.{name}"]
        for each in names if path.stem == "conditioner" else names[:1]:
            if each in self._tensors:
                return self._tensors[each].detach().float()
        raise CheckpointError(f"--check: PyTorch finds no tensor {shown(name)} in {path}.")


def _load(path: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a file by name; of a name that comes twice in a trainer's file, none."""
    import torch
    from safetensors.torch import load_file

    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    if is_safetensors:
        return load_file(str(path))
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zipfile's and torch's own
        raise CheckpointError(
            f"--check: torch.load refuses {path} ({brief(error)}); save the model's state_dict() alone."
        ) from None
    found: dict[str, torch.Tensor] = {}
    twice: set[str] = set()
    pending = [loaded]
    while pending:
        for name, value in pending.pop().items():
            if isinstance(value, dict):
                pending.append(value)
            elif isinstance(value, torch.Tensor) and isinstance(name, str):
                if name in found and not torch.equal(found[name], value):
                    twice.add(name)
                found[name] = value
    return {name: value for name, value in found.items() if name not in twice}


def _base_model(source: Source) -> Any:
    """Return transformers' model of the base, LoRA merged where the conversion is to merge it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(source.checkpoint.config or {})
    has_head = any(name.endswith("lm_head.weight") for name in source.weights)
    fields.setdefault("tie_word_embeddings", not has_head)
    config = AutoConfig.for_model(**fields)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).float()
    files = TorchFiles()
    given = {name: files.read(tensor) for name, tensor in source.weights.items()}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data.copy_(_found(name, given, shapes))
    if source.deltas:
        adapter = source.adapter or {}
        rank, parameters = adapter["r"], dict(model.named_parameters())
        scale = adapter["lora_alpha"] / (rank**0.5 if adapter.get("use_rslora") else rank)
        for name, (a, b, _) in source.deltas.items():
            parameters[name].data += scale * torch.matmul(files.read(b), files.read(a))
    return model


def _found(name: str, given: Mapping[str, torch.Tensor], shapes: Mapping[str, Any]) -> torch.Tensor:
    """Return the weight `name` of transformers' model: by its name, joined, or cut out of a fused one."""
    import torch

    bare = name.removeprefix("model.")
    for own in (
        name,
        bare,
        f"model.{name}",
        f"language_model.{name}",
        f"model.language_model.{bare}",
    ):
        if own in given:
            return given[own]
        for fused, parts in _FUSED.items():
            pieces = [own.replace(f".{fused}.", f".{part}.") for part in parts]
            if own not in pieces and all(piece in given for piece in pieces):
                return torch.cat([given[piece] for piece in pieces])
            for index, part in enumerate(parts):
                whole = own.replace(f".{part}.", f".{fused}.")
                if whole != own and whole in given:
                    sizes = [shapes[name.replace(f".{part}.", f".{each}.")][0] for each in parts]
                    return torch.split(given[whole], sizes)[index]
    raise CheckpointError(f"--check: PyTorch's model has a weight {name} that the source lacks.")


def _stream_model(backbone: TorchBackbone, source: Source) -> SpeculativeModel | None:
    """Return the PyTorch reference with the streams as trained; None without streams."""
    import torch

    from .pytorch.adapters import StreamAdapters
    from .pytorch.checkpoint import checkpoint_name, fill
    from .pytorch.model import SpeculativeModel

    if source.streams is None:
        return None
    config, named = source.streams
    files = TorchFiles()
    given = {pytorch_name(name)[0]: files.read(tensor) for name, tensor in named.items()}
    gates = {
        int(match[1]): given.pop(name)
        for name in list(given)
        if (match := re.fullmatch(r".*\.layers\.(\d+)\.stream_gate", name))
    }
    adapters = StreamAdapters(config, backbone)
    for parameter_name, parameter in adapters.named_parameters():
        layer = re.match(r"lora\.(\d+)\.", parameter_name)
        if layer and int(layer[1]) < adapters.first_msa_layer:  # may be left out: merged before
            given.setdefault(checkpoint_name(parameter_name), torch.zeros_like(parameter))
    fill(adapters, given, "--check")
    return SpeculativeModel(backbone, adapters.eval().requires_grad_(False), gates)


def _numpy(values: torch.Tensor) -> np.ndarray:
    return values.float().numpy()
