"""Who sees whom: main rows and the streams of some of them, in one boolean array.

With L = 3 main rows, streams at rows 1 and 2 and γ = 2 (1: sees; s: sees in shared mode only):

              M0  M1  M2 | S11 S12 | S21 S22
        M0     1         |         |
        M1     1   1     |  s   s  |
        M2     1   1   1 |         |  s   s
        S11    1   1     |  1      |
        S12    1   1     |  1   1  |
        S21    1   1   1 |         |  1
        S22    1   1   1 |         |  1   1
"""

from __future__ import annotations

import torch
from torch import Tensor


def stream_mask(main: Tensor, at: Tensor, num_streams: int, main_sees_streams: bool) -> Tensor:
    """Extend a main mask (B, L, L) by the streams of rows `at` (n,): (B, L + nγ, L + nγ) [SS Eq. 1-2]."""
    B, L, _ = main.shape
    owner = at.repeat_interleave(num_streams)
    level = torch.arange(num_streams).repeat(len(at))
    among = (owner[:, None] == owner) & (level <= level[:, None])
    to_streams = (torch.arange(L)[:, None] == owner) & main_sees_streams
    upper = torch.cat((main, to_streams.expand(B, -1, -1)), dim=-1)
    lower = torch.cat((main[:, owner], among.expand(B, -1, -1)), dim=-1)
    return torch.cat((upper, lower), dim=1)
