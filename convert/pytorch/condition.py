"""Parent-conditioned candidates: correct a stream's hidden state by the token it would follow [own].

The paper's streams are marginals: what stream 2 proposes does not know which token stream 1's candidate was. For a
parent token p with embedding e and a stream's final normed state s,

    s' = s + W2 silu(W1 [ê ; ŝ]) + B A ê            x̂ = x / rms(x)

Stream j of position t predicts x_{t+1+j}; its parent is x_{t+j}: the root for stream 1. A conditioner of two tokens
sees the parent's parent g as well, x_{t+j-1}: W1 [ê ; ŝ ; ĝ].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def unit(x: Tensor) -> Tensor:
    """Divide `x` (..., h) by its root mean square."""
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x.dtype)


class TorchConditioner(nn.Module):
    """The correction's weights: mlp_in (m, 2h or 3h), mlp_out (h, m), lora_A (r, h), lora_B (h, r).

    mlp_out and lora_A start at zero, so that training begins at the marginals.
    """

    def __init__(self, hidden_size: int, width: int, rank: int, num_tokens: int = 1) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.mlp_in = nn.Linear((1 + num_tokens) * hidden_size, width, bias=False)
        self.mlp_out = nn.Linear(width, hidden_size, bias=False)
        self.lora_A = nn.Linear(hidden_size, rank, bias=False)
        self.lora_B = nn.Linear(rank, hidden_size, bias=False)
        nn.init.zeros_(self.mlp_out.weight)
        nn.init.zeros_(self.lora_A.weight)

    def forward(
        self, parents: Tensor, hidden: Tensor, grandparents: Tensor | None = None
    ) -> Tensor:
        """Return s' (..., h) for the streams' normed states and their parents' embedding rows, all (..., h).

        grandparents: embedding rows of the parents' parents, for a conditioner of two tokens.
        """
        e, s = unit(parents).to(hidden.dtype), unit(hidden)
        seen = [e, s]
        if self.num_tokens > 1:
            assert grandparents is not None
            seen.append(unit(grandparents).to(hidden.dtype))
        w1, w2, a, b = (
            m.weight.to(hidden.dtype) for m in (self.mlp_in, self.mlp_out, self.lora_A, self.lora_B)
        )
        mlp = functional.linear(functional.silu(functional.linear(torch.cat(seen, dim=-1), w1)), w2)
        return hidden + mlp + functional.linear(functional.linear(e, a), b)
