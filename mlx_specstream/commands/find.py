"""`specstream find MODEL`: streams on the Hugging Face hub that fit a model, known by its fingerprint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from ..config import StreamConfig
from ..errors import OptionError, SpecStreamError, StreamsError, printable
from ..weights.checkpoint import CONFIG_FILE, FILES
from ..weights.fingerprint import fingerprint, same_base
from ..weights.hub import fetch, tagged
from .adoption.card import CHAIN_KEY, TAG


@dataclass(frozen=True)
class Found:
    """Streams that fit: what they are, and the tokens per pass that their maker measured, if any."""

    repository: str
    downloads: int
    mode: str
    num_streams: int
    tokens_per_pass: str | None

    def __str__(self) -> str:
        told = (
            f", {printable(self.tokens_per_pass)} tokens per pass" if self.tokens_per_pass else ""
        )
        return (
            f"{printable(self.repository)}: {self.mode}, {self.num_streams} streams{told}, "
            f"{self.downloads} downloads"
        )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `specstream find`."""
    parser = argparse.ArgumentParser(
        prog="specstream find",
        description="List streams on the Hugging Face hub that were made for a model.",
    )
    parser.add_argument("model", help="model folder, hub id, or 'demo'")
    parser.add_argument("--adapter-path", help="LoRA adapters of mlx-lm to load with the model")
    parser.add_argument(
        "--limit", type=int, default=200, help="look at so many repositories (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    return parser


def main(argv: list[str]) -> int:
    """Print what fits, the most downloaded first."""
    arguments = build_parser().parse_args(argv)
    if arguments.limit < 1:
        raise OptionError(f"--limit must be at least 1, got {arguments.limit}.")
    from ..loading.load import load

    model, _ = load(arguments.model, adapter_path=arguments.adapter_path, lazy=True, streams=None)
    own = fingerprint(model.model)
    found = list(matching(own, arguments.limit))
    if arguments.json:
        print(json.dumps([asdict(one) for one in found], ensure_ascii=False))
        return 0
    for one in found:
        print(one)
    if found:
        print(f"Use one with --streams, as in --streams {printable(found[0].repository)}.")
    else:
        print(f"Nobody has shared streams for {arguments.model} yet; make some: specstream adopt.")
    return 0


def matching(own: str, limit: int) -> Iterator[Found]:
    """Yield the hub's streams for the base with the fingerprint `own`.

    Raises:
        StreamsError: the hub cannot be reached.
    """
    for repository, downloads in tagged(TAG, limit, StreamsError):
        try:
            folder = fetch(repository, "streams", StreamsError, patterns=(CONFIG_FILE,))
            fields = FILES.read_config(folder / CONFIG_FILE)
            wanted, metadata = fields.get("base_fingerprint"), fields.get("metadata")
            known = {k: v for k, v in fields.items() if k not in NOT_CONFIG}
            config = StreamConfig.from_dict(known)
        except SpecStreamError:
            continue  # other people's repositories may hold anything
        if not isinstance(wanted, str) or same_base(wanted, own):
            continue
        per_pass = metadata.get(CHAIN_KEY) if isinstance(metadata, dict) else None
        told = per_pass if isinstance(per_pass, str) else None
        yield Found(repository, downloads, config.mode, config.num_streams, told)


NOT_CONFIG = ("base_model", "base_fingerprint", "tensors_digest", "metadata")
