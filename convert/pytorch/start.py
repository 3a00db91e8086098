"""Where a run starts: adapters, what is minimised, and which of their parameters are trained."""

from __future__ import annotations

import argparse

import torch

from ...errors import OptionError
from ...train.options import TrainOptions
from .adapters import StreamAdapters, grow
from .backbone import TorchBackbone
from .checkpoint import load_checkpoint
from .objectives import (
    Common,
    Objective,
    TorchLossless,
    TorchPruner,
    TorchShared,
)


def make_adapters(
    args: argparse.Namespace, options: TrainOptions, backbone: TorchBackbone
) -> StreamAdapters:
    """Make new adapters, or take those of `--start-from` and give them what they lack.

    Raises:
        OptionError: a pruner is to be trained and there are no streams for it.
    """
    if args.start_from:
        adapters = load_checkpoint(args.start_from, backbone)
        given = adapters.config
        wanted = {
            "num_streams": max(options.num_streams, given.num_streams),
            "mode": options.mode,
            "next_token_rank": given.next_token_rank or options.next_token_rank,
            "conditioner_tokens": max(options.conditioner_tokens, given.conditioner_tokens),
        }
        if options.part == "pruner":
            wanted["pruner_rank"] = options.pruner_rank
        if args.resize_rank:
            wanted["lora_rank"] = args.resize_rank
        grown = grow(adapters, backbone, **wanted)
        if options.mode == "shared" and given.mode == "lossless":
            grown.scale_lora(options.start_scale)
        return grown
    if options.part == "pruner":
        raise OptionError(
            "--train pruner needs --start-from with the streams that the pruner is for"
        )
    modules = tuple(backbone.layers[-1].linear_modules())
    config = options.stream_config(len(backbone.layers), modules)
    return StreamAdapters(config, backbone, args.embedding_std)


def make_objective(args: argparse.Namespace, options: TrainOptions, common: Common) -> Objective:
    """Return what is minimised."""
    if options.part == "pruner":
        return TorchPruner(common)
    if options.mode == "shared":
        return TorchShared(
            common,
            options.main_loss,
            options.stream_loss,
            gate_start=options.gate_start,
            streams=args.train != "plain",
        )
    return TorchLossless(common)


def parameter_groups(args: argparse.Namespace, adapters: StreamAdapters) -> list[dict[str, object]]:
    """Return the trained parameters with their learning rates; others are frozen."""
    rates = {
        "embeddings": args.embedding_lr,
        "rest": args.lr,
        "conditioner": args.conditioner_lr,
        "next_token": args.next_token_lr,
    }
    groups: dict[str, list[torch.Tensor]] = {kind: [] for kind in rates}
    for name, parameter in adapters.named_parameters():
        part = name.split(".")[0]
        trained = {"pruner": part == "pruner", "plain": part == "lora"}
        if not trained.get(args.train, part != "pruner"):
            parameter.requires_grad_(False)
            continue
        kind = "embeddings" if part == "stream_embeddings" else part
        groups[kind if kind in groups else "rest"].append(parameter)
    return [
        {"params": parameters, "lr": rates[kind]}
        for kind, parameters in groups.items()
        if parameters
    ]
