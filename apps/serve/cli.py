"""`specstream serve`: options, checked before the model is loaded."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields

from ...config import CacheConfig
from ...errors import OptionError
from ...generation.decode_options import (
    add_cache_options,
    add_decode_options,
    add_model_options,
    cache_config,
    decode_config,
    load_options,
)
from ...generation.sampling_options import add_sampler_options, sampling_config
from ...machine import ranks
from ...prompts.encode import template_args
from ..learning import LEARN_HELP, learned_file, notice
from .limits import Access, Limits

KEY_VARIABLE = "SPECSTREAM_API_KEY"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
# Field of `Limits`, type, and what it bounds.
_LIMITS = (
    ("decode_concurrency", int, "answers generated at the same time"),
    ("max_queue", int, "answers that may wait; one more is refused with 429"),
    ("max_tokens", int, "tokens of an answer whose request does not say"),
    ("max_tokens_limit", int, "tokens of any answer"),
    ("max_prompt_tokens", int, "tokens of a prompt (default: what the context holds)"),
    ("max_body_bytes", int, "bytes of a request"),
    ("max_connections", int, "connections open at once; beyond, the longest silent one is closed"),
    ("time_limit_s", float, "seconds from a request's arrival to the end of its answer"),
    ("header_time_limit_s", float, "seconds for sending a request's headers"),
    ("body_time_limit_s", float, "seconds for sending a request's body"),
    ("idle_time_limit_s", float, "seconds of silence between requests, or without reading"),
    ("shutdown_limit_s", float, "seconds that answers may take to finish when the server stops"),
    ("prefill_step_size", int, "prompt tokens per pass"),
    ("prompt_cache_bytes", int, "bytes of KV caches kept for later requests"),
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `specstream serve`."""
    parser = argparse.ArgumentParser(
        prog="specstream serve",
        description=(
            "Serve a model to OpenAI's clients and, at /, to a browser, in fewer passes of the "
            "model. Only this machine can reach it unless --host says otherwise."
        ),
    )
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=8080, help="port, 0 for any free one (default: %(default)s)"
    )
    access = parser.add_argument_group("access")
    access.add_argument(
        "--api-key",
        help=f"key that clients must send (better: the variable {KEY_VARIABLE})",
    )
    access.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="further name this server is reached by, beside localhost and addresses",
    )
    access.add_argument(
        "--allowed-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web page elsewhere that may ask, like https://chat.example",
    )
    add_sampler_options(parser)
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--chat-template-args",
        metavar="JSON",
        help="the chat template's variables where a request does not say, as "
        "'{\"enable_thinking\": false}'",
    )
    prompts.add_argument(
        "--allow-control-tokens",
        action="store_true",
        help="let users and tools write control tokens, with which they can forge turns",
    )
    limits = parser.add_argument_group("limits")
    defaults = Limits()
    for name, kind, meaning in _LIMITS:
        value = getattr(defaults, name)
        limits.add_argument(
            f"--{name.removesuffix('_s').replace('_', '-')}",
            dest=name,
            type=kind,
            default=value,
            help=meaning if value is None else f"{meaning} (default: %(default)s)",
        )
    add_cache_options(parser)
    add_decode_options(parser)
    parser.add_argument(
        "--no-speculation", action="store_true", help="decode plainly, one token per pass"
    )
    parser.add_argument("--learn", action="store_true", help=LEARN_HELP)
    parser.add_argument(
        "--log-level", type=str.upper, choices=_LEVELS, default="WARNING", help="how much to log"
    )
    return parser


def main(argv: list[str]) -> int:
    """Load the model and serve it until told to stop."""
    arguments = build_parser().parse_args(argv)
    defaults = sampling_config(arguments)
    config = decode_config(arguments)
    limits = Limits(**{field.name: getattr(arguments, field.name) for field in fields(Limits)})
    caching = cache_config(arguments)
    variables = template_args(arguments.chat_template_args, "--chat-template-args")
    check_caching(caching, limits)
    access = Access(
        arguments.api_key or os.environ.get(KEY_VARIABLE) or None,
        tuple(arguments.allowed_host),
        tuple(arguments.allowed_origin),
    )
    try:
        from .app import create_app
        from .run import check_access, listen, serve, url_of
        from .service import decoding, start_service
    except ModuleNotFoundError as error:
        raise OptionError(
            f"the server needs {error.name}, which is not installed; run: "
            "pip install 'mlx-specstream[serve]'"
        ) from error
    from ... import load
    from ...loading.folders import model_folder

    def loaded():  # type: ignore[no-untyped-def]
        return load(arguments.model, **load_options(arguments))

    if ranks.is_follower():
        from .following import follow

        with decoding(loaded, limits, config, not arguments.no_speculation, caching) as scheduler:
            follow(scheduler)
        return 0
    check_access(arguments.host, access)
    listening = listen(arguments.host, arguments.port)
    print(f"loading {arguments.model} ...", flush=True)
    learned = None
    if arguments.learn:
        folder = model_folder(arguments.model, arguments.revision)
        learned = learned_file(arguments.model, folder, arguments.adapter_path)
        print(notice(learned), flush=True)
    service = start_service(
        loaded,
        limits,
        defaults,
        config=config,
        speculative=not arguments.no_speculation,
        caching=caching,
        template_args=variables,
        control_tokens=arguments.allow_control_tokens,
        learned=learned,
    )
    streams = f" with {service.num_streams} streams" if service.num_streams else ""
    key = "" if access.api_key is None else "; clients must send the API key"
    print(
        f"serving {service.model_name}{streams} ({service.mode}) at {url_of(listening)}{key}",
        flush=True,
    )
    return serve(create_app(service, access), service, listening, arguments.log_level.lower())


def check_caching(caching: CacheConfig, limits: Limits) -> None:
    """Refuse to keep KV caches that are no beginning of another answer's.

    Raises:
        OptionError: with what to add.
    """
    if not caching.keeps_all and limits.prompt_cache_bytes:
        raise OptionError(
            "--max-kv-size and --kv-bits do not go with a prompt cache, because an answer would "
            "then depend on which requests came before it; add --prompt-cache-bytes 0."
        )
