"""Everything Speculative Streaming trains, as one module; no base weight is in it.

stream_embeddings (γ, h)            P_j [SS §3.1.1, Eq. 3]
stream_init       h -> r -> h       f(M) = M + B·A·M, optional
next_token        h -> r -> h       the streams' starts know x_{t+1}: + B·A·ê(x_{t+1}), optional [own]
lora              {layer: {module: (A (r, in), B (out, r))}}
pruner            h -> r -> h       o(M) = M + B·A·M [SS §3.1.3]
conditioner       parent-conditioned candidates, see `condition.py`
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...config import StreamConfig
from .backbone import TorchBackbone
from .condition import TorchConditioner, unit


class LowRank(nn.Module):
    """`scale` · B·A·x with A (r, in) and B (out, r); B starts at zero, so does the map."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
        return self.scale * functional.linear(functional.linear(x, a), b)


class StreamAdapters(nn.Module):
    """The trained parameters for one base model; float32."""

    def __init__(
        self,
        config: StreamConfig,
        backbone: TorchBackbone,
        embedding_std: float = 1.0,
    ) -> None:
        """Make untrained adapters.

        Args:
            embedding_std: scale of the P_j; far below the hidden state's own they are invisible and learn nothing.

        Raises:
            ValueError: a target module does not exist in the model, or N_s leaves no layer below.
        """
        super().__init__()
        num_layers, h = len(backbone.layers), backbone.hidden_size
        if config.num_msa_layers >= num_layers:
            raise ValueError(
                f"{config.num_msa_layers} MSA layers leave none below; the model has {num_layers} layers"
            )
        self.config = config
        self.first_msa_layer = num_layers - config.num_msa_layers
        self.stream_embeddings = nn.Parameter(torch.randn(config.num_streams, h) * embedding_std)
        self.stream_init = (
            LowRank(h, h, config.stream_init_rank) if config.stream_init_rank else None
        )
        self.next_token = LowRank(h, h, config.next_token_rank) if config.next_token_rank else None
        self.pruner = LowRank(h, h, config.pruner_rank) if config.pruner_rank else None
        self.conditioner = None
        if config.conditioner_rank:
            shape = config.conditioner_hidden, config.conditioner_rank, config.conditioner_tokens
            self.conditioner = TorchConditioner(h, *shape)
        first = 0 if config.mode == "shared" else self.first_msa_layer
        layers: dict[str, nn.ModuleDict] = {}
        for index in range(first, num_layers) if config.lora_rank else ():
            modules = backbone.layers[index].linear_modules()
            missing = [name for name in config.target_modules if name not in modules]
            if missing:
                raise ValueError(
                    f"layer {index} has no module {missing[0]!r}; it has {', '.join(modules)}"
                )
            layers[str(index)] = nn.ModuleDict(
                {
                    name.replace(".", "/"): LowRank(
                        modules[name].in_features,
                        modules[name].out_features,
                        config.lora_rank,
                        config.lora_scale,
                    )
                    for name in config.target_modules
                }
            )
        self.lora = nn.ModuleDict(layers)

    def delta(self, layer: int, name: str) -> LowRank | None:
        """Return the adapter of module `name` in layer `layer`, if there is one."""
        if str(layer) not in self.lora:
            return None
        modules = self.lora[str(layer)]
        key = name.replace(".", "/")
        return modules[key] if key in modules else None  # noqa: SIM401 (a ModuleDict has no get)

    def scale_lora(self, factor: float) -> None:
        """Multiply what LoRA adds by `factor`."""
        with torch.no_grad():
            for name, parameter in self.lora.named_parameters():
                if name.endswith("lora_B.weight"):
                    parameter.mul_(factor)

    def start(self, main: Tensor, following: Tensor | None = None) -> Tensor:
        """Return the streams' first states S_tj = f(M_t) + P_j [SS Eq. 3]: (..., h) -> (..., γ, h).

        following: embedding rows (..., h) of x_{t+1}, for streams that know it: + B·A·ê.
        """
        if self.stream_init is not None:
            main = main + self.stream_init(main)
        if self.next_token is not None:
            assert following is not None
            main = main + self.next_token(unit(following).to(main.dtype))
        return main.unsqueeze(-2) + self.stream_embeddings.to(main.dtype)

    def positions(self, main: Tensor) -> Tensor:
        """Return the streams' RoPE positions for main positions: (...) -> (..., γ)."""
        offsets = torch.arange(1, self.config.num_streams + 1, device=main.device)
        if self.config.rope_offset == "position":
            offsets = torch.zeros_like(offsets)
        return main.unsqueeze(-1) + offsets


def grow(adapters: StreamAdapters, backbone: TorchBackbone, **changes: object) -> StreamAdapters:
    """Return adapters of a changed config that hold everything the given ones have learned.

    Streams may be added (each new P_j starts at the last one), as may parts that did not exist (a pruner, the lower
    layers of shared mode, the next token at the start of streams, the conditioner's second token; the last two change
    nothing yet); a changed `lora_rank` keeps the maps' largest singular values, at the same alpha / rank.
    """
    before = adapters.config
    rank = changes.get("lora_rank", before.lora_rank)
    assert isinstance(rank, int)
    if before.lora_rank:
        changes["lora_alpha"] = before.lora_alpha * rank / before.lora_rank
    config = dataclasses.replace(before, **changes)  # type: ignore[arg-type]
    if config == before:
        return adapters
    grown, learned = StreamAdapters(config, backbone), adapters.state_dict()
    extra = config.num_streams - before.num_streams
    embeddings = learned["stream_embeddings"]
    learned["stream_embeddings"] = torch.cat((embeddings, embeddings[-1:].repeat(extra, 1)))
    fresh = grown.state_dict()
    if config.conditioner_tokens > before.conditioner_tokens:
        mlp_in = learned["conditioner.mlp_in.weight"]
        learned["conditioner.mlp_in.weight"] = torch.cat(
            (mlp_in, torch.zeros(len(mlp_in), backbone.hidden_size)), dim=1
        )
    if rank != before.lora_rank:
        for name in [n for n in learned if n.startswith("lora.") and n.endswith("lora_A.weight")]:
            other = name.replace("lora_A", "lora_B")
            learned[name], learned[other] = resize(
                learned[name], learned[other], fresh[name], fresh[other]
            )
    grown.load_state_dict({**fresh, **learned})
    return grown


def resize(a: Tensor, b: Tensor, fresh_a: Tensor, fresh_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return A (R, in) and B (out, R) whose product is the best rank-R copy of b·a; spare rank is as in the fresh pair.

    a: (r, in). b: (out, r). The singular values are split evenly between the two.
    """
    left, inner_left = torch.linalg.qr(b)
    right, inner_right = torch.linalg.qr(a.t())
    u, values, v = torch.linalg.svd(inner_left @ inner_right.t())
    kept = min(len(values), len(fresh_a))
    root = values[:kept].sqrt()
    new_a, new_b = fresh_a.clone(), fresh_b.clone()
    new_a[:kept] = root[:, None] * (v[:kept] @ right.t())
    new_b[:, :kept] = (left @ u[:, :kept]) * root
    return new_a, new_b
