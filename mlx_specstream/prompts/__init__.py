"""Prompts: reading them from files, the built-in dozen, and turning them into token ids."""

from .encode import encode_prompt
from .read import Prompt, built_in_prompts, read_prompts

__all__ = ["Prompt", "built_in_prompts", "encode_prompt", "read_prompts"]
