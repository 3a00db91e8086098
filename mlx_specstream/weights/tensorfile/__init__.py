"""safetensors files, read strictly and written as a stream; knows bytes and shapes, not models.

    | 8 bytes: n | n bytes of JSON: name -> dtype, shape, [start, stop) | tensor bytes, in a row |

| file | the idea it holds |
|---|---|
| `bits.py` | a tensor as its bits in NumPy, where bfloat16 is uint16, and what MLX makes of them |
| `read.py` | a header whose every claim is checked before a byte of a tensor is read |
| `write.py` | tensor after tensor, so that a file never has to fit in memory |
"""

from .bits import (
    FLOATS,
    MLX_TYPES,
    NUMPY_TYPES,
    TensorSpec,
    cast_bits,
    dtype_name,
    to_bits,
    to_mlx,
)
from .read import MAX_DIMENSIONS, TensorEntry, TensorFile, open_tensors, read_exactly
from .write import TensorWriter

__all__ = [
    "FLOATS",
    "MAX_DIMENSIONS",
    "MLX_TYPES",
    "NUMPY_TYPES",
    "TensorEntry",
    "TensorFile",
    "TensorSpec",
    "TensorWriter",
    "cast_bits",
    "dtype_name",
    "open_tensors",
    "read_exactly",
    "to_bits",
    "to_mlx",
]
