"""GGUF files: read safely, dequantised exactly, turned into mlx-lm folders.

`file` knows the container, `quants` the number formats, `architecture` what the tensors mean and how the config reads,
`tokenizer` the vocabulary; `folder` puts them together.
"""

from .file import GGUFFile, GGUFTensor, open_gguf
from .folder import write_model_folder

__all__ = ["GGUFFile", "GGUFTensor", "open_gguf", "write_model_folder"]
