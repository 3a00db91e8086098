"""`specstream adopt`: streams for a user's own model, in one command.

specstream adopt MODEL                     make streams; generate, chat and serve then use them
specstream adopt MODEL --continue          train them further, also on what --learn kept
specstream adopt --forget                  delete what --learn kept

Killed at any moment, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..apps.learning import learned_file, learned_folder
from ..errors import OptionError, StreamsError
from ..loading.model_cache import cache_folder
from ..machine import keep_float32_exact
from ..weights.adopted import adopted_folder, place_of
from ..weights.fingerprint import weights_digest
from .adoption.state import STATE_FILE, AdoptionState, AdoptSettings, alone, clear, is_further

if TYPE_CHECKING:
    from ..weights.checkpoint import StreamWeights
    from .adoption.stages import Adoption

PLAN, INSTALLATION = "plan", "installation"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `specstream adopt`."""
    parser = argparse.ArgumentParser(
        prog="specstream adopt",
        description=(
            "Make streams for your model: it answers prompts, streams are trained on its answers, "
            "checked and measured, and from then on used by themselves. Stop it whenever you like; "
            "the same command goes on."
        ),
    )
    parser.add_argument(
        "model", nargs="?", help="model folder, hub id, 'demo' or 'gemma3-270m'; also quantised"
    )
    parser.add_argument("--adapter-path", help="LoRA adapters of mlx-lm that belong to the model")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="how long it may take (default: %(default)g)"
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="your own prompts, asked before the built-in ones"
    )
    parser.add_argument(
        "--documents",
        metavar="FILE",
        nargs="+",
        default=[],
        help="your own texts, about whose parts the model is asked",
    )
    parser.add_argument(
        "--mode",
        choices=("lossless", "shared"),
        default="lossless",
        help="shared: a fine-tune of the model with its streams (default: %(default)s)",
    )
    parser.add_argument(
        "--continue",
        dest="further",
        action="store_true",
        help="train on from the streams in use, also on answers that --learn of chat and serve kept",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="write the streams there instead of putting them to use"
    )
    parser.add_argument("--yes", action="store_true", help="start without asking")
    parser.add_argument(
        "--restart", action="store_true", help="begin anew, whatever is under way for this model"
    )
    parser.add_argument(
        "--forget", action="store_true", help="delete the answers that --learn kept, of all models"
    )
    return parser


def main(argv: list[str]) -> int:
    """Adopt a model, or go on adopting it."""
    arguments = build_parser().parse_args(argv)
    if arguments.forget:
        if arguments.model is not None:
            raise OptionError("--forget deletes what was kept of all models; leave out the model.")
        print(forget())
        return 0
    if arguments.model is None:
        raise OptionError("name the model to adopt, as in specstream adopt demo.")
    settings = AdoptSettings(
        arguments.model,
        arguments.adapter_path,
        arguments.minutes,
        arguments.mode,
        arguments.prompts,
        arguments.documents,
        arguments.further,
        arguments.output,
    )
    keep_float32_exact()
    from ..loading.folders import adapter_folder, model_folder
    from ..loading.load import load

    folder = model_folder(settings.model)
    adapter = str(adapter_folder(settings.adapter_path)) if settings.adapter_path else None
    place = place_of(folder, adapter)
    target = adopted_folder(Path(settings.model).name, place)
    work = cache_folder() / "adopt" / target.name
    if settings.output is not None:
        target = Path(settings.output).expanduser()
    with alone(work):
        state = AdoptionState.open(work, settings, arguments.restart)
        _check_target(target, state)
        if state.plan is None and not arguments.yes and not sys.stdin.isatty():
            raise OptionError(
                "adopt asks before it starts, and there is no terminal to ask on; add --yes."
            )
        model, tokenizer = load(settings.model, adapter_path=adapter, streams=None)
        state.check_model(weights_digest(model.model))
        from .adoption.stages import Adoption

        name = Path(settings.model).name if Path(settings.model).exists() else settings.model
        adoption = Adoption(state, model, tokenizer, name)
        present = _present(adoption, folder)
        if settings.further and present is None:
            raise StreamsError(
                f"there are no streams for {settings.model} to train on from; leave out --continue."
            )
        if settings.further:
            adoption.given = present
            learned = learned_file(settings.model, folder, adapter)
            adoption.learned = learned if learned.exists() else None
        if state.plan is None:
            if present is not None and not settings.further:
                print(
                    f"{settings.model} has streams already ({present.folder}); new ones are made from "
                    "nothing and take their place, while --continue would train those further.",
                    flush=True,
                )
            _agree(adoption, ask=not arguments.yes)
        else:
            print(
                f"Going on: {', '.join(state.done) or 'nothing'} done, {state.spent_s / 60:.1f} of "
                f"{settings.minutes:g} minutes spent.",
                flush=True,
            )
        _run(adoption)
        _install(adoption, target)
        print(_result(adoption, target), flush=True)
        clear(work)
    return 0


def forget() -> str:
    """Delete all answers that --learn kept, and adoptions under way that train on them.

    Returns what was deleted, in a sentence. Streams that were trained on them stay.
    """
    kept = [path for path in learned_folder().glob("*.jsonl") if path.is_file()]
    size = sum(path.stat().st_size for path in kept)
    shutil.rmtree(learned_folder(), ignore_errors=True)
    for work in (cache_folder() / "adopt").glob("*"):
        if (work / STATE_FILE).is_file() and is_further(work):
            with alone(work):
                clear(work)
    return f"Deleted the kept answers of {len(kept)} models, {size / 1e6:.1f} MB."


def _agree(adoption: Adoption, *, ask: bool) -> None:
    """Try out what it takes, say it, and let the user agree.

    Raises:
        OptionError: the user does not.
    """
    state = adoption.state
    print(f"Trying out what it takes for {state.settings.model} here ...", flush=True)
    with state.stage(PLAN):
        plan = adoption.make_plan()
    print("\n".join(plan.lines()), flush=True)
    if ask and input("Start? [y/N] ").strip().lower() not in ("y", "yes"):
        clear(state.folder)
        raise OptionError("nothing was started.")
    state.plan = plan.to_dict()
    state.save()


def _run(adoption: Adoption) -> None:
    """Do all stages that are not done."""
    from .adoption import measures

    adoption.answers()
    adoption.training()
    measures.record_acceptance(adoption)
    measures.verify(adoption)
    measures.benchmark(adoption)


def _check_target(target: Path, state: AdoptionState) -> None:
    """Make sure, before any work is done, that the streams can be put where they are to be.

    Raises:
        OutputError: something else is there, or nothing can be written there.
    """
    from ..weights.files import refuse_existing, writable_parent

    if INSTALLATION not in state.done:
        # What adopt put in its own place before is replaced; a folder that a user names never is.
        refuse_existing(target, files_only=state.settings.output is None)
    writable_parent(target)


def _install(adoption: Adoption, target: Path) -> None:
    """Put the streams with their card where they are found, whole or not at all."""
    from ..weights.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_streams, save_streams
    from ..weights.files import atomic_folder, refuse_existing
    from .adoption.card import CARD_FILE, CHAIN_KEY, adoption_card

    state, made = adoption.state, adoption.made
    figures = state.figures
    weights = load_streams(made)
    base = weights.base
    if INSTALLATION not in state.done:
        if state.settings.output is not None:
            refuse_existing(target)
        state.done.append(INSTALLATION)  # first: a kill may come right after it
        state.save()
    with atomic_folder(target, if_exists="replace") as partial:
        save_streams(
            partial,
            weights.config,
            weights.tensors,
            base_model=base.name if base else None,
            fingerprint=base.fingerprint if base else None,
            metadata={**weights.metadata, CHAIN_KEY: f"{figures['tokens_per_pass']['chain']:.2f}"},
        )
        for path in sorted(made.iterdir()):
            if path.name not in (CONFIG_FILE, WEIGHTS_FILE):
                shutil.copyfile(path, partial / path.name)
        card = adoption_card(weights, f"Streams for {adoption.base_name}", figures)
        (partial / CARD_FILE).write_text(card, encoding="utf-8")


def _present(adoption: Adoption, folder: Path) -> StreamWeights | None:
    """Return the streams that the model is used with now, if there are any."""
    from ..weights.shipped import AUTO, find_streams

    adapter = adoption.state.settings.adapter_path
    return find_streams(AUTO, adoption.model.model, folder, adapter_path=adapter)


def _result(adoption: Adoption, target: Path) -> str:
    """Return the last line: what was gained, and how it is used."""
    figures, settings = adoption.state.figures, adoption.state.settings
    per_pass = figures["tokens_per_pass"]
    use = f"use them with --streams {target}"
    if settings.output is None and settings.mode == "lossless":
        use = f"generate, chat and serve use them for {settings.model} by themselves"
    return (
        f"{per_pass['chain']:.2f} tokens per pass as a chain, {per_pass['16 rows']:.2f} with 16 rows, "
        f"{figures['bench']['speedup']:.2f}x as fast as mlx-lm here; the streams are in {target}, and "
        f"{use}."
    )
