"""`specstream cache_prompt`: run a long prompt once and keep its KV cache in a file.

The file is mlx-lm's: `specstream generate --prompt-cache-file` and `mlx_lm.generate` go on from
it, and `specstream generate` goes on from what `mlx_lm.cache_prompt` writes.
"""

from __future__ import annotations

import argparse
import sys

from ..errors import OptionError
from ..generation.decode_options import add_cache_options, cache_config
from ..loading.demo import DEMO_NAME
from .generate import prompt_text


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `specstream cache_prompt`."""
    parser = argparse.ArgumentParser(
        prog="specstream cache_prompt",
        description="Run a long prompt once and keep its KV cache, to ask about it many times.",
    )
    parser.add_argument(
        "--model",
        default=DEMO_NAME,
        help="model folder, hub id, or 'demo' for the demo model (default: %(default)s)",
    )
    parser.add_argument("--adapter-path", help="LoRA adapters of mlx-lm to load with the model")
    parser.add_argument(
        "--prompt", required=True, help="what to keep; '-' reads it from standard input"
    )
    parser.add_argument("--prompt-cache-file", required=True, help="the .safetensors file to write")
    parser.add_argument(
        "--prefill-step-size",
        type=int,
        default=2048,
        help="prompt tokens per pass; fewer take less memory (default: %(default)s)",
    )
    add_cache_options(parser)
    return parser


def main(argv: list[str]) -> int:
    """Run the prompt and write its cache."""
    arguments = build_parser().parse_args(argv)
    config = cache_config(arguments)
    if arguments.prefill_step_size < 1:
        raise OptionError(
            f"--prefill-step-size must be at least 1, got {arguments.prefill_step_size}."
        )
    if not arguments.prompt_cache_file.endswith(".safetensors"):
        raise OptionError(
            f"--prompt-cache-file must end in .safetensors, got {arguments.prompt_cache_file}."
        )

    from ..loading.folders import is_built_in, model_folder
    from ..loading.load import load
    from ..model.cache.files import save_prompt_cache
    from ..model.cache.kinds import check_quantised
    from ..model.prefill import prefill_chunks
    from ..prompts import Prompt, encode_prompt

    text = prompt_text(arguments.prompt)
    model, tokenizer = load(arguments.model, adapter_path=arguments.adapter_path, streams=None)
    backbone = model.backbone
    check_quantised(backbone.forward, backbone.windows, config)
    ids = encode_prompt(tokenizer, Prompt.user(text), unfinished=True)
    cache = backbone.new_cache(config)
    # The last token goes alone, as in mlx-lm, where it would be decoded from.
    for part in (ids[:-1], ids[-1:]):
        for _ in prefill_chunks(backbone.forward, part, cache, arguments.prefill_step_size):
            print(f"\r{cache.length} of {len(ids)} tokens", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    name = arguments.model
    if is_built_in(name):
        name = str(model_folder(name))  # for mlx-lm, which does not know these names
    save_prompt_cache(arguments.prompt_cache_file, cache, name)
    print(f"{arguments.prompt_cache_file}: {cache.length} tokens, {cache.nbytes / 1e6:.1f} MB")
    return 0
