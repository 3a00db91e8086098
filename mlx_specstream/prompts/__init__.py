"""Prompts: reading them from files, the built-in dozen, and turning them into token ids."""

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
