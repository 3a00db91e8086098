"""Random answers of tiny models, decoded by as many processes as there are: one line each.

    python -m tests.support.together --seed 1 --cases 20 [--pipeline]

What the leader of several processes prints must be what one process prints.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "phi3", "gpt_oss")
TREES = ("chain", "chain2", "4", "8", "2^2", "8:4", "4 inline")
CACHES = ({}, {}, {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 7}, {"max_kv_size": 24})


def launch(
    processes: int, words: Sequence[str], timeout: float = 240
) -> list[tuple[int, str, str]]:
    """Run a Python program in several processes that find each other over the loopback ring.

    Returns status, output and errors of each. A process that does not end in time is killed.
    """
    sockets = [socket.socket() for _ in range(processes)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    with tempfile.TemporaryDirectory() as folder:
        hostfile = Path(folder) / "hosts.json"
        hostfile.write_text(json.dumps(hosts), encoding="utf-8")
        for one in sockets:
            one.close()
        started = [
            subprocess.Popen(
                [sys.executable, *words],
                env={
                    **os.environ,
                    "MLX_RANK": str(rank),
                    "MLX_HOSTFILE": str(hostfile),
                    "OPENBLAS_NUM_THREADS": "1",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        try:
            ended = [one.communicate(timeout=timeout) for one in started]
        finally:
            for one in started:
                one.kill()
    return [(one.returncode, out, err) for one, (out, err) in zip(started, ended, strict=True)]


def main() -> None:
    """Decode the cases; the leader prints them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--pipeline", action="store_true")
    arguments = parser.parse_args()

    import mlx.core as mx
    import numpy as np

    from mlx_specstream import StreamModel, batch_generate, generate, stream_generate
    from mlx_specstream.config import DecodeConfig, SamplingConfig, StreamConfig
    from mlx_specstream.loading.parallel import divided
    from mlx_specstream.machine import ranks
    from mlx_specstream.model.backbone import Backbone
    from mlx_specstream.speculation.streams import Streams
    from tests.support.random_streams import linear_modules, random_tensors
    from tests.support.tiny import byte_tokenizer
    from tests.support.tiny_models import tiny_random_model

    tokenizer, draw = byte_tokenizer(), np.random.default_rng(arguments.seed)
    for number in range(arguments.cases):
        family = str(draw.choice(FAMILIES))
        setting = str(draw.choice(TREES))
        caching = CACHES[draw.integers(len(CACHES))]
        temp, seed = float(draw.choice([0.0, 0.9])), int(draw.integers(1000))
        mode = "shared" if draw.random() < 0.25 else "lossless"
        prompts = [draw.integers(0, 12, size=n).tolist() for n in draw.integers(2, 30, size=3)]
        wide = {"head_dim": 32} if "kv_bits" in caching else {}
        if "kv_bits" in caching and family not in ("llama", "qwen3", "qwen3_moe"):
            family = "llama"  # heads of no group's width, or windows, which are not quantised
        if mode == "shared" and "inline" not in setting:
            setting = f"{setting} inline"
        whole = Backbone(tiny_random_model(family, seed=seed, **wide))
        if "kv_bits" in caching and any(whole.windows):
            caching = {}
        config = StreamConfig(
            num_streams=3,
            num_msa_layers=2,
            stream_init_rank=3,
            lora_rank=4,
            lora_alpha=8.0,
            target_modules=tuple(
                path
                for path in linear_modules(whole, 0 if mode == "shared" else 2)
                if path.startswith("self_attn") or family != "qwen3_moe"
            ),
            pruner_rank=2,
            conditioner_rank=3,
            conditioner_hidden=5,
            mode=mode,
        )
        gates = mode == "shared" and family in ("llama", "qwen3")
        scale = 0.1 if mode == "shared" else 0.5
        tensors = random_tensors(whole, config, seed, scale=scale, gates=gates)
        model = tiny_random_model(family, seed=seed, **wide)
        backbone = divided(model, pipeline=arguments.pipeline)
        model = StreamModel(model, backbone, Streams(backbone, config, tensors))
        decode = DecodeConfig.parse(setting)
        mx.random.seed(seed)
        sampling = SamplingConfig(temp=temp, repetition_penalty=1.4)
        batched = family in ("llama", "qwen2", "qwen3") and mode == "lossless" and not caching
        several = number % 4 == 3 and batched and ":" not in setting
        if several and len(backbone.stages.own) == backbone.num_layers:
            together = batch_generate(model, tokenizer, prompts, max_tokens=12, config=decode)
            said: list[object] = list(together.texts)
        elif several:  # what a batch says is what each would alone
            said = [
                generate(model, tokenizer, prompt, max_tokens=12, config=decode)
                for prompt in prompts
            ]
        else:
            answer = stream_generate(
                model,
                tokenizer,
                prompts[0],
                max_tokens=20,
                sampler=sampling.sampler(12, tokenizer),
                logits_processors=sampling.processors(),
                config=decode,
                **caching,
            )
            responses = list(answer)
            # Drafts never change the text, so what streams propose shows in what was accepted.
            said = [[response.token for response in responses], responses[-1].stats.accepted]
        if not ranks.is_follower():
            print(json.dumps([number, family, setting, mode, temp, caching, said]), flush=True)


if __name__ == "__main__":
    main()
