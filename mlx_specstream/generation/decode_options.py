"""The command-line options that say which model and streams, and how to decode with them.

Shared by every verb that generates; each option maps onto a field of `DecodeConfig`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields
from typing import NoReturn, TypedDict

from ..config import AUTO, CacheConfig, DecodeConfig, TreeSpec, TypicalSpec
from ..errors import OptionError
from ..loading.demo import DEMO_NAME

LOSSY_NOTE = "typical acceptance is lossy: the text may differ from what the model says by itself."


class LoadOptions(TypedDict):
    """Arguments of `load`."""

    adapter_path: str | None
    revision: str | None
    streams: str | None
    streams_revision: str | None
    pipeline: bool
    draft_model: str | None


def add_model_options(parser: argparse.ArgumentParser, default: str = DEMO_NAME) -> None:
    """Add --model, --adapter-path, --streams and the revisions of what is on the hub."""
    parser.add_argument(
        "--model",
        default=default,
        help=(
            "model folder, hub id (owner/name, or owner/name@revision), 'demo' for the demo model, or "
            "'gemma3-270m' for one more that needs no hub (default: %(default)s)"
        ),
    )
    parser.add_argument("--revision", help="branch, tag or commit of the model on the hub")
    parser.add_argument(
        "--pipeline",
        action="store_true",
        help="among processes (mlx.launch) divide the model by layers, not each of its layers",
    )
    parser.add_argument("--adapter-path", help="LoRA adapters of mlx-lm to load with the model")
    parser.add_argument(
        "--streams",
        default=AUTO,
        help=(
            "stream folder, hub id, name of a shipped set, or 'none'; 'auto' takes what "
            "specstream adopt made here, else what the model's folder holds, else a shipped set "
            "for the same base (default: %(default)s)"
        ),
    )
    parser.add_argument("--streams-revision", help="branch, tag or commit of streams on the hub")
    parser.add_argument(
        "--draft-model",
        metavar="NAME",
        help=(
            "what drafts in place of streams: a smaller model of the same vocabulary, named as "
            "--model is, or a folder of a converted drafter (Medusa, Hydra, EAGLE)"
        ),
    )
    parser.add_argument(
        "--num-draft-tokens",
        type=int,
        metavar="N",
        dest="draft_chain",
        help="draft a chain of N tokens, as --tree chainN does; mlx-lm's word",
    )
    parser.add_argument(
        "--trust-remote-code", nargs="*", action=_RefuseCode, help=argparse.SUPPRESS
    )


def add_decode_options(
    parser: argparse._ActionsContainer,
    *,
    tree: TreeSpec | None = None,
    several_trees: bool = False,
    lossy: bool = False,
) -> None:
    """Add --tree, --drafts, --prune, --schedule and --no-conditioning; if `lossy`, --lossy-typical.

    `tree` is the default of --tree, None for the general one. Only a verb whose every output
    says when it is lossy may offer that.
    """
    default = DecodeConfig() if tree is None else DecodeConfig(tree)
    tree_help = (
        "draft tree: 'auto' (what pays on this machine, plain decoding included), 'chain', "
        "'chain3' (three drafts), '16' (the best 16 rows) or '3^4' (the paper's product tree) "
        f"(default: {default.tree})"
    )
    if several_trees:
        parser.add_argument("--tree", action="append", help=f"{tree_help}; may be repeated")
    else:
        parser.add_argument("--tree", default=str(default.tree), help=tree_help)
    parser.add_argument(
        "--drafts",
        metavar="{streams,lookup|streams|lookup|none}",
        help=(
            "where drafts come from: the model's streams, or look-up: what followed when the text "
            "read so before, which works for any model (default: both with the tree 'auto', "
            "streams with another)"
        ),
    )
    parser.add_argument(
        "--prune",
        metavar="KEEP[:THRESHOLD]",
        help=(
            "early-exit pruning: at most KEEP rows go on into the upper layers, and none whose "
            "probability given its parent is below THRESHOLD (default: no pruning)"
        ),
    )
    parser.add_argument(
        "--schedule",
        metavar="{auto,inline,inline:N,deferred}",
        default=default.schedule,
        help=(
            "when streams run: in the verifying pass, for all nodes or the N at which the accepted "
            "path likeliest ends, or after it for the accepted node alone (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--no-conditioning",
        action="store_true",
        help="do not re-rank candidates by their parent token (the paper's method as it stands)",
    )
    if not lossy:
        return
    parser.add_argument(
        "--lossy-typical",
        nargs="?",
        const=str(TypicalSpec()),
        metavar="EPSILON[:DELTA]",
        help=(
            "LOSSY: also take drafts that the model did not choose but finds probable, above "
            "min(EPSILON, DELTA * exp(-entropy)); the text is no longer the model's own "
            f"(default: off; without a value {TypicalSpec()})"
        ),
    )


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Add mlx-lm's --max-kv-size, --kv-bits, --kv-group-size and --quantized-kv-start."""
    default = CacheConfig()
    group = parser.add_argument_group("KV cache")
    group.add_argument(
        "--max-kv-size",
        type=int,
        help="keep only so many rows of text, the first four always (default: all)",
    )
    group.add_argument(
        "--kv-bits", type=int, help="store the cache in so many bits (default: unquantised)"
    )
    group.add_argument(
        "--kv-group-size",
        type=int,
        default=default.kv_group_size,
        help="channels that share a scale in a quantised cache (default: %(default)s)",
    )
    group.add_argument(
        "--quantized-kv-start",
        type=int,
        default=default.quantized_kv_start,
        help="rows of text before the cache turns quantised (default: %(default)s)",
    )


def cache_config(arguments: argparse.Namespace) -> CacheConfig:
    """Return the config that the cache options describe.

    Raises:
        OptionError: an option is out of range.
    """
    return CacheConfig(
        max_kv_size=arguments.max_kv_size,
        kv_bits=arguments.kv_bits,
        kv_group_size=arguments.kv_group_size,
        quantized_kv_start=arguments.quantized_kv_start,
    )


def streams_option(arguments: argparse.Namespace) -> str | None:
    """Return --streams as `load` takes it."""
    return None if arguments.streams.lower() == "none" else arguments.streams


def load_options(arguments: argparse.Namespace) -> LoadOptions:
    """Return what `load` takes besides the model's name."""
    return {
        "adapter_path": arguments.adapter_path,
        "revision": arguments.revision,
        "streams": streams_option(arguments),
        "streams_revision": arguments.streams_revision,
        "pipeline": arguments.pipeline,
        "draft_model": arguments.draft_model,
    }


def decode_config(arguments: argparse.Namespace, tree: str | None = None) -> DecodeConfig:
    """Return the config that the options describe, with `tree` in place of --tree if given.

    Raises:
        OptionError: an option cannot be read or is out of range.
    """
    tree = arguments.tree if tree is None else tree
    chain: int | None = getattr(arguments, "draft_chain", None)
    if chain is not None:
        if chain < 1:
            raise OptionError(f"--num-draft-tokens must be at least 1, got {chain}.")
        tree = f"chain{chain}"
    return DecodeConfig.of_words(
        tree,
        prune=arguments.prune,
        schedule=arguments.schedule,
        use_conditioner=not arguments.no_conditioning,
        typical=getattr(arguments, "lossy_typical", None),
        drafts=arguments.drafts,
    )


def described(config: DecodeConfig) -> dict[str, object]:
    """Return the JSON form of a config, the tree as it is written on the command line."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    prune = config.prune
    values["tree"] = str(config.tree)
    values["prune"] = None if prune is None else {"keep": prune.keep, "threshold": prune.threshold}
    values["typical"] = None if config.typical is None else asdict(config.typical)
    values["lossy"] = config.lossy
    values["drafts"] = None if config.drafts is None else list(config.drafts)
    return values


class _RefuseCode(argparse.Action):
    """mlx-lm's --trust-remote-code."""

    def __call__(self, *_: object, **__: object) -> NoReturn:
        raise OptionError(
            "--trust-remote-code is not supported: mlx-specstream never runs code that a model "
            "brings along; leave it out."
        )
