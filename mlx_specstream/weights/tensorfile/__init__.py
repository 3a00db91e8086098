"""safetensors files, read strictly and written as a stream; knows bytes and shapes, not models.

    | 8 bytes: n | n bytes of JSON: name -> dtype, shape, [start, stop) | tensor bytes, in a row |

| file | the idea it holds |
|---|---|
| `bits.py` | a tensor as its bits in NumPy, where bfloat16 is uint16, and what MLX makes of them |
| `bounded.py` | files and JSON that may be hostile, at a bounded cost |
| `read.py` | a header whose every claim is checked before a byte of a tensor is read |
| `compare.py` | names and shapes that are found against those expected |
| `write.py` | tensor after tensor, so that a file never has to fit in memory |
"""

from .bits import (
    FLOATS,
    MLX_TYPES,
    NUMPY_TYPES,
    TensorSpec,
    cast_bits,
    dtype_name,
    is_finite,
    to_bits,
    to_mlx,
)
from .bounded import open_file, parse_json, read_file
from .compare import Shape, difference
from .read import MAX_DIMENSIONS, TensorEntry, TensorFile, open_tensors, read_exactly
from .write import TensorWriter

__all__ = [
    "FLOATS",
    "MAX_DIMENSIONS",
    "MLX_TYPES",
    "NUMPY_TYPES",
    "Shape",
    "TensorEntry",
    "TensorFile",
    "TensorSpec",
    "TensorWriter",
    "cast_bits",
    "difference",
    "dtype_name",
    "is_finite",
    "open_file",
    "open_tensors",
    "parse_json",
    "read_exactly",
    "read_file",
    "to_bits",
    "to_mlx",
]
