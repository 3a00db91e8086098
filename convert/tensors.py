"""A tensor somewhere in a checkpoint: known by name, dtype and shape, read when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from ..weights.tensorfile import NUMPY_TYPES, TensorSpec, read_exactly


@dataclass(frozen=True)
class SourceTensor(TensorSpec):
    """One tensor of a file; `load` reads its bits (bfloat16 as uint16), shape and dtype as named.

    At most one tensor is in memory at a time, so a checkpoint larger than memory converts. Where
    the bits lie in the file as they are, in order, `start` says from which byte on.
    """

    origin: Path
    load: Callable[[], np.ndarray] = field(compare=False, repr=False)
    start: int | None = None

    def read(self) -> np.ndarray:
        """Read the bits.

        Raises:
            CheckpointError: the file cannot be read any more, or has become shorter.
        """
        with self.stable():
            return self.load()

    @contextmanager
    def stable(self) -> Iterator[None]:
        """Turn a file that cannot be read any more into one sentence."""
        try:
            yield
        except EOFError as error:
            raise self._changed(str(error)) from None
        except OSError as error:
            if error.filename is None or Path(error.filename) != self.origin:
                raise
            raise self._changed(error.strerror or str(error)) from None

    def _changed(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.origin} could not be read while it was converted ({reason}); "
            "do not change it meanwhile, and try again."
        )

    def read_row(self, row: int) -> np.ndarray:
        """Read one row of the first axis, where `start` is known."""
        assert self.start is not None
        bits = np.empty(self.shape[1:], NUMPY_TYPES[self.dtype])
        with self.stable(), self.origin.open("rb", buffering=0) as file:
            read_exactly(file, self.start + row * bits.nbytes, bits)
        return bits

    def renamed(self, name: str) -> SourceTensor:
        """Return the same tensor under another name."""
        return SourceTensor(name, self.dtype, self.shape, self.origin, self.load, self.start)
