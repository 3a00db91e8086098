"""Several processes that decode one text together, as `mlx.launch` starts them.

Every process runs the same program and takes the same decisions, because whatever it decides by is
the same everywhere: the logits, the seed, and, where a time or an outside word counts, what the
leader (rank 0) has read and told the others. The leader alone talks to the user and writes files.

Without a launcher there is one process, and nothing here costs anything.
"""

from __future__ import annotations

import os
import struct
import sys
import time
from functools import cache as once
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

# What the launchers of MLX's back ends (ring and jaccl, MPI) tell a process.
_RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
FOLLOWER_PATIENCE = 2.0  # seconds in which the leader can say first what went wrong everywhere


def rank() -> int:
    """Return this process's number, 0 for the leader; asks the environment alone."""
    found = next((os.environ[name] for name in _RANKS if os.environ.get(name, "").isdecimal()), "0")
    return int(found)


def is_launched() -> bool:
    """Tell whether a launcher started this process."""
    return any(os.environ.get(name, "").isdecimal() for name in _RANKS)


def is_follower() -> bool:
    """Tell whether another process talks to the user and writes files."""
    return rank() > 0


@once
def group() -> mx.distributed.Group | None:
    """Return the processes that decode together, None for this one alone."""
    if not is_launched():
        return None
    import mlx.core as mx

    found = mx.distributed.init()
    return found if found.size() > 1 else None


def count() -> int:
    """Return how many processes decode together."""
    found = group()
    return 1 if found is None else found.size()


def told(data: bytes = b"") -> bytes:
    """Return the leader's `data` in every process; what others pass is not looked at.

    Every process must call this at the same place of its program, with no pass under way that the
    others have not begun.
    """
    import numpy as np

    together = group()
    if together is None:
        return data
    import mlx.core as mx

    leads = not is_follower()

    def shared(numbers: np.ndarray) -> np.ndarray:
        own = mx.array(numbers if leads else np.zeros_like(numbers))
        return np.array(mx.distributed.all_sum(own, group=together, stream=mx.cpu))

    (length,) = shared(np.array([len(data)], dtype=np.int32)).tolist()
    if not length:
        return b""
    buffer = np.frombuffer(data, dtype=np.uint8) if leads else np.zeros(length, dtype=np.uint8)
    return bytes(shared(buffer).tobytes())


def clock() -> float:
    """Return the leader's clock in seconds, the same number in every process."""
    now = time.perf_counter()
    if group() is None:
        return now
    (value,) = struct.unpack("d", told(struct.pack("d", now)))
    return float(value)


def leave_talking_to_leader() -> None:
    """Let followers say nothing but what ends them (`speak_again`)."""
    if is_follower():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.stderr = sys.stdout


def speak_again() -> None:
    """Let a follower say on stderr what ends it."""
    if is_follower():
        sys.stderr = sys.__stderr__
