"""A tensor somewhere in a checkpoint: known by name, dtype and shape, read when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlx_specstream.errors import CheckpointError
from mlx_specstream.tensorfile import TensorSpec


@dataclass(frozen=True)
class SourceTensor(TensorSpec):
    """One tensor of a file; `load` reads its bits (bfloat16 as uint16), shape and dtype as named.

    At most one tensor is in memory at a time, so a checkpoint larger than memory converts.
    """

    origin: Path
    load: Callable[[], np.ndarray] = field(compare=False, repr=False)

    def read(self) -> np.ndarray:
        """Read the bits.

        Raises:
            CheckpointError: the file cannot be read any more, or has become shorter.
        """
        try:
            return self.load()
        except (OSError, EOFError) as error:
            raise CheckpointError(
                f"{self.origin} could not be read while it was converted ({error}); "
                "do not change it meanwhile, and try again."
            ) from None

    def renamed(self, name: str) -> SourceTensor:
        """Return the same tensor under another name."""
        return SourceTensor(name, self.dtype, self.shape, self.origin, self.load)
