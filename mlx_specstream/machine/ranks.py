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
from collections.abc import Callable
from functools import cache as once
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from ..errors import ModelError, brief

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np

# What the launchers of MLX's back ends (ring and jaccl, MPI) tell a process.
_RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_BACK_ENDS = ("[ring]", "[jaccl]", "[mpi]", "[nccl]", "[distributed]")
_SOFTWARE = ("mlx-specstream", "mlx", "mlx-lm")
FOLLOWER_PATIENCE = 2.0  # seconds in which the leader can say first what went wrong everywhere

_apart = False
_telling_s = 0.0  # spent in `clock`, which its own readings leave out


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
    """Return the processes that decode together, None for this one alone.

    Raises:
        ModelError: they cannot be connected, or run different versions.
    """
    if _apart or not is_launched():
        return None
    import mlx.core as mx

    try:
        found = mx.distributed.init()
    except RuntimeError as error:
        raise ModelError(_unconnected(str(error))) from error
    if found.size() == 1:
        if is_follower():
            raise ModelError(_unconnected("no back end was found"))
        return None
    _check_versions(found)
    return found


def _unconnected(error: str) -> str:
    """Return the sentence for processes that do not find each other."""
    mend = "start all of them again"
    if "bind" in error:
        mend = "another program uses its port: choose another with mlx.launch --starting-port"
    elif "connect" in error:
        mend = "start all of them at about the same time, and check the addresses in the host file"
    return f"process {rank()} could not be connected to the others ({brief(error)}); {mend}."


def _check_versions(together: mx.distributed.Group) -> None:
    """Make sure that all processes compute with the same software.

    Raises:
        ModelError: they do not.
    """
    found = ", ".join(f"{name} {_version(name)}" for name in _SOFTWARE)
    every = [one.rstrip(b"\0").decode() for one in gathered(found.encode(), 128, together)]
    for number, other in enumerate(every):
        if other != every[0]:
            raise ModelError(
                f"process {number} runs {other} and process 0 {every[0]}; install the same versions "
                "on every machine."
            )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "of no version"


def work_apart() -> None:
    """Let this process compute for itself, though others were started beside it."""
    global _apart
    _apart = True
    group.cache_clear()


def count() -> int:
    """Return how many processes decode together."""
    found = group()
    return 1 if found is None else found.size()


def is_loss(error: BaseException) -> bool:
    """Tell whether a back end says that another process is gone."""
    return is_launched() and isinstance(error, RuntimeError) and str(error).startswith(_BACK_ENDS)


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


def gathered(data: bytes, length: int, together: mx.distributed.Group | None = None) -> list[bytes]:
    """Return what every process passes, by rank, each cut or filled with zeros to `length` bytes.

    Every process must call this at the same place of its program.
    """
    import numpy as np

    own = data[:length].ljust(length, b"\0")
    together = together or group()
    if together is None:
        return [own]
    import mlx.core as mx

    sent = mx.array(np.frombuffer(own, dtype=np.uint8)[None])
    every: np.ndarray = np.array(mx.distributed.all_gather(sent, group=together, stream=mx.cpu))
    return [bytes(one) for one in every.tolist()]


def check_same(digest: Callable[[], bytes], sentence: str) -> None:
    """Make sure that every process holds the same thing, known by its digest of up to 32 bytes.

    sentence: says what is wrong of `{odd}`, the first process that differs from the leader.

    Raises:
        ModelError: one does not.
    """
    if group() is None:
        return
    every = gathered(digest(), 32)
    odd = next((number for number, other in enumerate(every) if other != every[0]), None)
    if odd is not None:
        raise ModelError(sentence.format(odd=f"process {odd}"))


def clock() -> float:
    """Return the leader's clock in seconds, the same number in every process.

    It stands still while it is told, so that what is timed does not pay for that.
    """
    global _telling_s
    now = time.perf_counter()
    if group() is None:
        return now
    (value,) = struct.unpack("d", told(struct.pack("d", now - _telling_s)))
    _telling_s += time.perf_counter() - now
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
