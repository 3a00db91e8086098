"""The proof, number by number: what a finished folder holds against what PyTorch reads from the source.

a tensor as it is or cast     the bits that PyTorch has, and rounds to
a merged LoRA                 those within float32's rounding of the sum
a quantised tensor            within a step of its group (a step is the scale; for the floating
                              modes, half the largest value), dequantised without MLX
a field of a config           what the source's config says
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from ..errors import shown
from .dequantise import dequantised, settings_of
from .plan import ConversionPlan
from .reverse import pytorch_name
from .tensors import Tensor

if TYPE_CHECKING:
    from .check import Findings
    from .torch_reference import TorchReference

_RELATIVE = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half a unit in the last place."""
_MERGED = 2.0**-18
"""Of the largest weight: what sums in another order may differ by."""
_REWRITTEN = ("dtype", "torch_dtype", "quantization", "quantization_config")
_LORA = ("lora_rank", "lora_alpha", "target_modules")


class Written:
    """The tensors of a folder's files, read by safetensors' own reader."""

    def __init__(self, folder: Path, pattern: str) -> None:
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob(pattern)):
            file = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor


def compare_weights(
    plan: ConversionPlan,
    exact: ConversionPlan,
    reference: TorchReference,
    folder: Path,
    findings: Findings,
) -> None:
    """Compare every base tensor as written with its source.

    exact: the same conversion in float32, for tensors that PyTorch's model has not by this name.
    """
    assert plan.base is not None
    assert exact.base is not None
    written = Written(folder, "model*.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = dict(reference.base.named_parameters())
    planned = {tensor.name: tensor for tensor in exact.base.tensors}
    for tensor in plan.base.tensors:
        name = tensor.name
        if missing := [spec.name for spec in tensor.outputs if spec.name not in written]:
            findings.beyond.append(f"{missing[0]} is missing")
            continue
        source = _source(planned[name], known.get(name))
        value = written[name]
        if not source.is_floating_point():
            if not torch.equal(value, source):
                findings.beyond.append(f"{name} differs from its source")
            continue
        if tensor.parts:
            whole = torch.from_numpy(planned[name].make()[0].copy())
            _compare(name, whole, source, _merged(tensor, source), findings)
            value, allowed = _unpacked(name, written, config["quantization"], source)
        elif "merge LoRA" in tensor.operations:
            allowed = source.abs() * _RELATIVE[value.dtype] + _merged(tensor, source)
        else:
            allowed = (source.to(value.dtype).float() - source).abs()
        _compare(name, value.float(), source, allowed, findings)


def compare_streams(
    plan: ConversionPlan, reference: TorchReference, folder: Path, findings: Findings
) -> None:
    """Compare every stream tensor as written with the one that PyTorch read under its name on disk."""
    if plan.streams is None:
        return
    written = Written(folder, "streams.safetensors")
    for tensor in plan.streams.tensors:
        name, is_transposed = pytorch_name(tensor.name)
        source = reference.streams.get(name)
        if source is None or tensor.name not in written:
            findings.beyond.append(f"the source has no {name} for {tensor.name}")
            continue
        value = written[tensor.name]
        source = source.T if is_transposed else source
        if value.shape != source.shape:
            findings.beyond.append(f"{tensor.name} has another shape than its source")
            continue
        allowed = (source.to(value.dtype).float() - source).abs()
        _compare(tensor.name, value.float(), source, allowed, findings)


def compare_configs(plan: ConversionPlan, folder: Path, findings: Findings) -> None:
    """Compare what the source's configs say with what the folder's do."""
    assert plan.source is not None
    merged = _LORA if plan.options.merge_lora == "all" else ()
    for file, given, rewritten in (
        ("config.json", plan.source.checkpoint.config, _REWRITTEN),
        ("streams_config.json", plan.source.stream_fields, (*merged, "stream_init")),
    ):
        path = folder / file
        if given is None or not path.exists():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        is_whole = file == "config.json"
        for name, value in given.items():
            if value is None or name in rewritten or not (is_whole or name in found):
                continue
            if found.get(name) != value:
                findings.beyond.append(
                    f"{file}: {name} is {shown(found.get(name))}, its source says {shown(value)}"
                )


def _source(planned: Tensor, known: torch.nn.Parameter | None) -> torch.Tensor:
    """Return PyTorch's own weight, or what the conversion makes of it where mlx-lm computes it."""
    if known is not None and planned.sources and tuple(known.shape) == planned.shape:
        return known.detach()
    return torch.from_numpy(planned.make()[0].copy())


def _merged(tensor: Tensor, source: torch.Tensor) -> torch.Tensor:
    """Return by how much a sum may differ that was made in another order; nothing where none was made."""
    is_sum = "merge LoRA" in tensor.operations
    return source.abs().max() * _MERGED if is_sum else torch.zeros(())


def _unpacked(
    name: str, written: Written, quantization: Mapping[str, Any], source: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a quantised weight as floats, and by how much each may differ from its source."""
    module = name.rpartition(".")[0]
    scales, biases = written[f"{module}.scales"], f"{module}.biases"
    bits, mode = settings_of(quantization, module)
    bias = written[biases] if biases in written else None  # noqa: SIM401 (no dict)
    value = dequantised(written[name], scales, bias, bits, mode)
    groups = source.unflatten(-1, (scales.shape[-1], -1)).abs()
    step = scales.float().abs() if mode == "affine" else groups.amax(-1) / 2
    allowed = step[..., None].expand_as(groups).flatten(-2) * 1.05 + source.abs() * 2.0**-6
    return value, allowed


def _compare(
    name: str,
    value: torch.Tensor,
    source: torch.Tensor,
    allowed: torch.Tensor,
    findings: Findings,
) -> None:
    error = (value - source).abs()
    group = re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight"))
    largest = float(error.max()) if error.numel() else 0.0
    findings.weights[group] = max(findings.weights.get(group, 0.0), largest)
    if not bool((error <= allowed + 2.0**-126).all()):  # NaN is not
        findings.beyond.append(f"{name} differs from its source by {largest:.2e}")
