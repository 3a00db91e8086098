"""Where a run starts: adapters, what is minimised, and which of their parameters are trained."""

from __future__ import annotations

import argparse

import torch

from ...config import StreamConfig
from ...errors import OptionError
from .adapters import StreamAdapters, grow
from .backbone import TorchBackbone
from .checkpoint import load_checkpoint
from .objectives import (
    Common,
    TorchLossless,
    Objective,
    TorchPruner,
    TorchShared,
)


def make_adapters(args: argparse.Namespace, backbone: TorchBackbone) -> StreamAdapters:
    """Make new adapters, or take those of `--start-from` and give them what they lack.

    Raises:
        OptionError: a pruner is to be trained and there are no streams for it.
    """
    if args.start_from:
        adapters = load_checkpoint(args.start_from, backbone)
        wanted = {
            "num_streams": max(args.num_streams, adapters.config.num_streams),
            "mode": args.mode,
            "next_token_rank": adapters.config.next_token_rank or args.next_token_rank,
            "conditioner_tokens": max(args.conditioner_tokens, adapters.config.conditioner_tokens),
        }
        if args.train == "pruner":
            wanted["pruner_rank"] = args.pruner_rank
        if args.resize_rank:
            wanted["lora_rank"] = args.resize_rank
        grown = grow(adapters, backbone, **wanted)
        if args.mode == "shared" and adapters.config.mode == "lossless":
            grown.scale_lora(args.start_scale)
        return grown
    if args.train == "pruner":
        raise OptionError(
            "--train pruner needs --start-from with the streams that the pruner is for"
        )
    modules = tuple(args.target_modules or backbone.layers[-1].linear_modules())
    config = StreamConfig(
        num_streams=args.num_streams,
        num_msa_layers=args.num_msa_layers,
        mode=args.mode,
        lora_rank=args.lora_rank,
        lora_alpha=args.lora_alpha,
        target_modules=modules if args.lora_rank else (),
        conditioner_rank=args.conditioner_rank,
        conditioner_hidden=args.conditioner_hidden,
        next_token_rank=args.next_token_rank,
        conditioner_tokens=args.conditioner_tokens if args.conditioner_rank else 1,
    )
    return StreamAdapters(config, backbone, args.embedding_std)


def make_objective(args: argparse.Namespace, common: Common) -> Objective:
    """Return what is minimised."""
    if args.train == "pruner":
        return TorchPruner(common)
    if args.mode == "shared":
        return TorchShared(
            common,
            args.main_weight,
            args.stream_weight,
            gate_start=args.gate_start,
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
