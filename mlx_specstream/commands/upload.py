"""`specstream upload FOLDER owner/name`: share streams on the Hugging Face hub.

What goes there: the streams, their config, what was accepted, the training's log and the card.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..weights.checkpoint import load_streams
from ..weights.hub import check_repository, upload
from ..weights.shipped import STREAM_FILES
from .adoption.card import CARD_FILE, adoption_card

SHARED_FILES = (*STREAM_FILES, CARD_FILE, "training_log.jsonl")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `specstream upload`."""
    parser = argparse.ArgumentParser(
        prog="specstream upload",
        description=(
            "Upload a folder of streams to the Hugging Face hub, where others find them by "
            "specstream find and use them with --streams owner/name. A converted model is uploaded by "
            "specstream convert --upload-repo."
        ),
    )
    parser.add_argument("folder", help="streams folder, as specstream adopt or train made it")
    parser.add_argument("repository", help="owner/name; it is made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make it readable by you alone")
    return parser


def main(argv: list[str]) -> int:
    """Check the folder, write a card if it has none, and upload both."""
    arguments = build_parser().parse_args(argv)
    check_repository(arguments.repository, "the repository")
    folder = Path(arguments.folder).expanduser()
    weights = load_streams(folder)
    card = folder / CARD_FILE
    if not card.exists():
        name = arguments.repository.rpartition("/")[2]
        card.write_text(adoption_card(weights, name, {}), encoding="utf-8")
    upload(folder, arguments.repository, patterns=SHARED_FILES, private=arguments.private)
    print(f"{arguments.repository} is there; use it with --streams {arguments.repository}.")
    return 0
