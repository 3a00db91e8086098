"""Prompts: read from files, built in, and turned into token ids.

| file | the idea it holds |
|---|---|
| `read.py` | mlx-lm's data formats, one JSON object a line, or plain text |
| `lines.py` | lines of text and of JSON: the one reader of prompt files, training data and logs |
| `control.py` | control tokens in user text are spelled out |
| `encode.py` | a prompt as the model reads it, through its chat template and the variables given to it |
"""

from .encode import encode_prompt
from .read import Prompt, built_in_prompts, prompt_of, read_prompts, read_records

__all__ = [
    "Prompt",
    "built_in_prompts",
    "encode_prompt",
    "prompt_of",
    "read_prompts",
    "read_records",
]
