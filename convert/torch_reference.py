"""PyTorch's side of the proof: the source checkpoint in float32, read by PyTorch's own readers.

    files      torch.load(weights_only=True), safetensors' own reader; GGUF, which neither reads, by ours
    base       transformers' own model of the source's config.json, filled by name; weights that
               MLX has quantised are worked out here (`dequantise.py`)
    streams    the PyTorch reference (`pytorch/model.py`) with the tensors as they are in their files

Only which tensors there are, by file and name in it, comes from the conversion: no value, no layer,
no split, no transposition and no LoRA scale does; what a tensor is, is worked out from its name in
the file once more (`_plain`), unless a user's rules renamed it. Needs the extra `torch`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckpointError, OptionError, brief, shown
from .plan import ConversionPlan, Source
from .reverse import pytorch_name
from .tensors import Tensor
from .torch_source import TorchFiles

if TYPE_CHECKING:
    import torch

    from ..config import StreamConfig
    from .check import Findings
    from .check_runs import Trace
    from .pytorch.backbone import TorchBackbone
    from .pytorch.model import SpeculativeModel

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class TorchReference:
    """A plan's source in PyTorch.

    Raises:
        OptionError: torch is missing.
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
        self.torch = torch
        self.streams: dict[str, torch.Tensor] = {}
        self.model = None
        by_file = plan.options.rules is None
        try:
            self.base = _base_model(plan.source, by_file).float().eval().requires_grad_(False)
            if plan.source.streams is not None:
                config, named = plan.source.streams
                self.backbone = TorchBackbone(self.base)
                self.streams = _stream_tensors(named, by_file)
                self.model = _stream_model(self.backbone, config, dict(self.streams))
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
                logits = self.base(ids).logits[0]
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


_WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer"
    r"|base_model|modules_to_save|default|language_model)\.(?=.)"
)


def _plain(name: str) -> str:
    """Return a tensor's name without what wrappers add: `layers.3.mlp.up_proj.weight`."""
    name = re.sub(r"^(?:model\.)+", "", _WRAPPERS.sub("", name))
    return re.sub(r"\.gamma$", ".weight", name)


def _own_name(tensor: Tensor, ours: str, by_file: bool) -> str:
    """Return the plain name of a tensor by its file; by ours where a user's rules or GGUF renamed it."""
    path, name = tensor.sources[0]
    return _plain(name if by_file and path.suffix != ".gguf" else ours)


def _base_model(source: Source, by_file: bool) -> Any:
    """Return transformers' model of the base, LoRA merged where the conversion is to merge it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(source.checkpoint.config or {})
    has_head = any(name.endswith("lm_head.weight") for name in source.weights)
    fields.setdefault("tie_word_embeddings", not has_head)
    quantization = fields.pop("quantization", None)
    if quantization is not None:
        fields.pop("quantization_config", None)  # mlx-lm writes it twice
    config = AutoConfig.for_model(**fields)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).float()
    files = TorchFiles()
    given = _weights(source.weights, quantization, files, by_file)
    parameters = {_plain(name): parameter for name, parameter in model.named_parameters()}
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data.copy_(_found(name, given, shapes))
    if source.deltas:
        adapter = source.adapter or {}
        rank = adapter["r"]
        scale = adapter["lora_alpha"] / (rank**0.5 if adapter.get("use_rslora") else rank)
        for ours, (a, b, _) in source.deltas.items():
            halves = [
                _own_name(each, ours, by_file).replace(f".lora_{half}", "")
                for each, half in ((a, "A"), (b, "B"))
            ]
            name = halves[0] if halves[0].endswith(".weight") else f"{halves[0]}.weight"
            if halves[0] != halves[1]:
                raise CheckpointError(
                    f"--check: {shown(a.origin)} and {shown(b.origin)} are no pair."
                )
            parameters[name].data += scale * torch.matmul(files.read(b), files.read(a))
    return model


def _weights(
    weights: Mapping[str, Tensor],
    quantization: Mapping[str, Any] | None,
    files: TorchFiles,
    by_file: bool,
) -> dict[str, torch.Tensor]:
    """Return a base's tensors by plain name, float32; those with scales beside them are dequantised."""
    found = {}
    for ours, tensor in weights.items():
        module, _, part = ours.rpartition(".")
        name = _own_name(tensor, ours, by_file)
        if quantization is None or f"{module}.scales" not in weights:
            found[name] = files.read(tensor)
        elif part == "weight":
            from .dequantise import dequantised, settings_of

            bits, mode = settings_of(quantization, module)
            scales = files.raw(weights[f"{module}.scales"])
            biases = weights.get(f"{module}.biases")
            bias = None if biases is None else files.raw(biases)
            found[name] = dequantised(files.raw(tensor), scales, bias, bits, mode)
        elif part not in ("scales", "biases"):  # a bias of the layer's own
            found[name] = files.read(tensor)
    return found


def _found(name: str, given: Mapping[str, torch.Tensor], shapes: Mapping[str, Any]) -> torch.Tensor:
    """Return the weight of this plain name: as it is, joined, or cut out of a fused one."""
    import torch

    if name in given:
        return given[name]
    for fused, parts in _FUSED.items():
        pieces = [name.replace(f".{fused}.", f".{part}.") for part in parts]
        if name not in pieces and all(piece in given for piece in pieces):
            return torch.cat([given[piece] for piece in pieces])
        for index, part in enumerate(parts):
            whole = name.replace(f".{part}.", f".{fused}.")
            if whole != name and whole in given:
                sizes = [shapes[name.replace(f".{part}.", f".{each}.")][0] for each in parts]
                return torch.split(given[whole], sizes)[index]
    raise CheckpointError(f"--check: PyTorch's model has a weight {name} that the source lacks.")


def _stream_tensors(named: Mapping[str, Tensor], by_file: bool) -> dict[str, torch.Tensor]:
    """Return the stream tensors, float32, under the names of schema 1."""
    files, found = TorchFiles(), {}
    for ours, tensor in named.items():
        wanted = pytorch_name(ours)[0]
        name = _own_name(tensor, wanted, by_file).removesuffix(".weight")
        if tensor.sources[0][0].stem == "conditioner" and not name.startswith("conditioner."):
            name = f"conditioner.{name}"
        name = re.sub(r"\.self_attn\.stream_gate$", ".stream_gate", name)
        if name.startswith("layers."):
            name = f"base_model.model.model.{name}"
        found[name if name.endswith(".stream_gate") else f"{name}.weight"] = files.read(tensor)
    return found


def _stream_model(
    backbone: TorchBackbone, config: StreamConfig, given: dict[str, torch.Tensor]
) -> SpeculativeModel:
    """Return the PyTorch reference with the streams as trained, `given` by names of schema 1."""
    import torch

    from .pytorch.adapters import StreamAdapters
    from .pytorch.checkpoint import checkpoint_name, fill
    from .pytorch.model import SpeculativeModel

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
