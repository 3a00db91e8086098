"""Tokens per step of trained streams, teacher-forced over the model's own greedy text.

Of a shared-mode checkpoint that is the text of the fine-tuned model (`task.py` writes it).

For every text each position's drafts are scored, as a chain and as best-first trees of several sizes, with marginal and
with parent-conditioned candidates; then the text is walked as decoding would: a step that accepts a drafts moves a + 1
tokens on. Both figures are given, over all positions and walking.

    python -m mlx_specstream.convert.pytorch.evaluate --model DIR --checkpoint OUT --data own_test.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...exit_status import exit_status
from ...train.batches import Selection
from ...train.data import Example, read_distilled
from ...train.figures import NUM_CANDIDATES, Tally
from ...train.targets import rows_of_batch
from ...weights.files import atomic_file, refuse_same_file
from .backbone import TorchBackbone
from .checkpoint import load_checkpoint
from .joint import JointStreams
from .packed import PackedBatch, PackedStreams
from .states import StateReader, compute_states

NO_TARGET = -1
POSITIONS = 64
"""Positions whose trees are built together."""


@dataclass(frozen=True)
class StreamCandidates:
    """Each stream's best tokens. ids: (N, γ, C) int64. log_probs: (N, γ, C). hidden: (N, γ, h)."""

    ids: Tensor
    log_probs: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class WantedTokens:
    """What follows N positions of a text: their roots x_{t+1} (N,), the tokens x_t (N,) before those, and the
    streams' targets (N, γ), NO_TARGET past the end.
    """

    before: Tensor
    roots: Tensor
    targets: Tensor

    @classmethod
    def of(cls, text: Example, num_streams: int) -> WantedTokens:
        """Return what follows the last prompt token and every answer token but the last."""
        first = text.prompt_length - 1
        rows = rows_of_batch(
            [Selection(text, tuple(range(first, len(text.tokens) - 1)))], num_streams
        )
        targets = np.full(len(text.answer) * num_streams, NO_TARGET)
        targets[rows.index] = rows.target
        table = torch.from_numpy(targets).view(-1, num_streams)
        return cls(torch.tensor(text.tokens[first:-1]), torch.tensor(text.answer), table)

    def of_rows(self, rows: slice) -> WantedTokens:
        """Return what follows some of the positions."""
        return WantedTokens(self.before[rows], self.roots[rows], self.targets[rows])


def candidates(packed: PackedStreams, hidden: Tensor) -> StreamCandidates:
    """Return the best `NUM_CANDIDATES` tokens of normed stream states (N, γ, h), whole vocabulary."""
    logits = (hidden @ packed.backbone.head_weight.t()).float()
    best = logits.topk(min(NUM_CANDIDATES, logits.shape[-1]), dim=-1)
    return StreamCandidates(best.indices, best.values - logits.logsumexp(-1, keepdim=True), hidden)


def conditioned_log_probs(
    packed: PackedStreams,
    found: StreamCandidates,
    level: int,
    parents: Tensor,
    grandparents: Tensor,
) -> Tensor:
    """Return log-probabilities (N, W, C) of stream `level`'s candidates given each of the parents (N, W)."""
    conditioner = packed.adapters.conditioner
    assert conditioner is not None
    hidden = found.hidden[:, level, None].expand(-1, parents.shape[1], -1)
    known = [packed.backbone.embed(ids) for ids in (parents, grandparents)]
    change = conditioner(known[0], hidden, known[1]) - hidden
    gain = change.float() @ packed.backbone.head_weight[found.ids[:, level]].float().transpose(1, 2)
    log_probs = found.log_probs[:, level, None]
    scores = log_probs + gain
    return scores.log_softmax(-1) + log_probs.logsumexp(-1, keepdim=True)


def accepted_in_tree(
    packed: PackedStreams,
    found: StreamCandidates,
    wanted: WantedTokens,
    rows: int,
    conditioned: bool,
) -> Tensor:
    """Return how many drafts of a best-first tree with `rows` rows (root included) the text accepts, (N,).

    Level by level, the best rows - 1 nodes are expanded: no better node can hang below a worse one. `rows=0` asks for
    the chain.
    """
    N, G, C = found.ids.shape
    width = rows - 1 if rows else 1
    tokens, before, scores = wanted.roots[:, None], wanted.before[:, None], torch.zeros(N, 1)
    right = torch.ones(N, 1, dtype=torch.bool)
    all_scores, all_right = [], []
    for level in range(G):
        if conditioned:
            log_probs = conditioned_log_probs(packed, found, level, tokens, before)
        else:
            log_probs = found.log_probs[:, level, None].expand(-1, tokens.shape[1], -1)
        ids = found.ids[:, level, None].expand_as(log_probs)
        hit = (ids == wanted.targets[:, level, None, None]) & right[:, :, None]
        best = (
            (scores[:, :, None] + log_probs)
            .flatten(1)
            .topk(min(width, tokens.shape[1] * C), dim=-1)
        )
        scores, before, tokens, right = (
            best.values,
            tokens.gather(1, best.indices // C),
            ids.flatten(1).gather(1, best.indices),
            hit.flatten(1).gather(1, best.indices),
        )
        all_scores.append(scores)
        all_right.append(right)
    if not rows:
        return torch.cat(all_right, dim=1).sum(1)
    kept = torch.cat(all_scores, dim=1).topk(width, dim=-1).indices
    return torch.cat(all_right, dim=1).gather(1, kept).sum(1)


def evaluate(
    packed: PackedStreams,
    texts: Sequence[Example],
    sizes: Sequence[int],
    foresee: Callable[[Example], Tensor],
) -> dict[str, object]:
    """Return tokens per step by kind of candidates and tree size (0: chain), and per-stream top-1 and top-3.

    foresee: gives the normed stream states (A, γ, h) of a text with A answer tokens.
    """
    G = packed.adapters.config.num_streams
    kinds = (
        ("marginal", "conditioned") if packed.adapters.conditioner is not None else ("marginal",)
    )
    tallies = {(kind, size): Tally() for kind in kinds for size in (0, *sizes)}
    hits, valid = torch.zeros(2, G), torch.zeros(G)
    for text in tqdm(texts, desc="evaluate", unit="text"):
        hidden, wanted = foresee(text), WantedTokens.of(text, G)
        accepted: dict[tuple[str, int], list[int]] = {key: [] for key in tallies}
        for start in range(0, len(hidden), POSITIONS):
            part = slice(start, start + POSITIONS)
            some = wanted.of_rows(part)
            found = candidates(packed, hidden[part])
            match = found.ids == some.targets[..., None]
            hits += torch.stack([match[..., :1].any(-1).sum(0), match[..., :3].any(-1).sum(0)])
            valid += (some.targets != NO_TARGET).sum(0)
            for kind, size in tallies:
                drafts = accepted_in_tree(packed, found, some, size, kind == "conditioned")
                accepted[kind, size] += drafts.tolist()
        for key, tally in tallies.items():
            tally.add(accepted[key])
    figures: dict[str, object] = {"texts": len(texts), "tokens": sum(len(t.answer) for t in texts)}
    figures["top1"], figures["top3"] = (
        [round(float(v), 4) for v in row / valid.clamp(min=1)] for row in hits
    )
    for (kind, size), tally in tallies.items():
        figures[f"{kind} {'chain' if not size else f'{size} rows'}"] = tally.figures()
    return figures


def lossless_streams(
    packed: PackedStreams, reader: StateReader | None = None
) -> Callable[[Example], Tensor]:
    """Return what gives a text's stream states over a frozen base, its states kept or computed."""

    def foresee(text: Example) -> Tensor:
        num_layers = packed.adapters.config.num_msa_layers
        states = (
            reader[text.key]
            if reader
            else compute_states(packed.backbone, text.prompt, text.answer, num_layers)
        )
        rows = torch.arange(len(text.answer))
        following = torch.tensor(text.answer)
        return packed.forward(PackedBatch([states], [rows], [len(text.prompt) - 1], following))

    return foresee


def shared_streams(packed: PackedStreams) -> Callable[[Example], Tensor]:
    """Return what gives a text's stream states where main runs with the adapters too."""
    joint = JointStreams(packed.backbone, packed.adapters)

    def foresee(text: Example) -> Tensor:
        streams = joint.forward([text]).streams
        assert streams is not None
        return streams

    return foresee


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate", description="Tokens per step over the model's own text."
    )
    parser.add_argument("--model", required=True, help="local Hugging Face model folder")
    parser.add_argument("--checkpoint", required=True, help="schema-1 folder")
    parser.add_argument(
        "--data", required=True, nargs="+", help="JSON-lines files that distill.py wrote"
    )
    parser.add_argument("--states", help="base states that distill.py kept (prefix)")
    parser.add_argument(
        "--rows", type=int, nargs="*", default=[4, 8, 16, 32], help="tree sizes, root included"
    )
    parser.add_argument("--limit", type=int, default=0, help="texts measured; 0 means all")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--output", help="JSON file for the figures")
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    refuse_same_file({"--data": args.data, **({"--output": args.output} if args.output else {})})
    backbone = TorchBackbone.load(args.model, getattr(torch, args.dtype))
    packed = PackedStreams(backbone, load_checkpoint(args.checkpoint, backbone))
    texts = read_distilled(args.data)
    texts = texts[: args.limit] if args.limit else texts
    with torch.inference_mode():
        if packed.adapters.config.mode == "shared":
            foresee = shared_streams(packed)
        else:
            reader = StateReader(args.states) if args.states else None
            foresee = lossless_streams(packed, reader)
        figures = evaluate(packed, texts, args.rows, foresee)
    print(json.dumps(figures, indent=1))
    if args.output:
        with atomic_file(args.output, if_exists="replace") as path:
            path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(lambda: main(sys.argv[1:]), "evaluate"))
