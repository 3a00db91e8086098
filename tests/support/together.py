"""Random answers of tiny models, decoded by as many processes as there are: one line each.

    python -m tests.support.together --seed 1 --cases 20 [--pipeline] [--demo]

What the leader of several processes prints must be what one process prints; so many agreed:

    python -m tests.support.together --processes 2 --cases 200
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from mlx_specstream.config import Mode

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "phi3", "gpt_oss")
AT_ONCE = 25  # cases that one start of the processes decodes
ASKED = ("What is the sea?", "List three colours.", "Write a line of Python.", "Who was Ada?")
TREES = ("chain", "chain2", "4", "8", "2^2", "8:4", "4 inline")
CACHES: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 7},
    {"max_kv_size": 24},
)


def launch(
    processes: int,
    words: Sequence[str],
    timeout: float = 240,
    environment: Mapping[str, str] | None = None,
) -> list[tuple[int, str, str]]:
    """Run a Python program in several processes that find each other over the loopback ring.

    environment: more variables for them. Returns status, output and errors of each. A process that
    does not end in time is killed.
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
                    **(environment or {}),
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
            for process in started:
                process.kill()
    return [(one.returncode, out, err) for one, (out, err) in zip(started, ended, strict=True)]


def main() -> None:
    """Decode the cases, of which the leader prints what came out; or compare processes with one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--pipeline", action="store_true")
    parser.add_argument("--demo", action="store_true", help="the demo model in place of tiny ones")
    parser.add_argument("--processes", type=int, help="compare so many with one")
    arguments = parser.parse_args()
    if arguments.processes:
        sys.exit(compare(arguments.processes, arguments.seed, arguments.cases))

    import numpy as np

    from mlx_specstream.machine import ranks

    draw = np.random.default_rng(arguments.seed)
    decode_case = demo_case if arguments.demo else tiny_case
    for number in range(arguments.cases):
        found = decode_case(number, draw, pipeline=arguments.pipeline)
        if not ranks.is_follower():
            print(json.dumps(found), flush=True)


def compare(processes: int, seed: int, cases: int) -> int:
    """Decode `cases` in one process and in several and count those that agree; 1 if one does not.

    In turns: tiny models divided as they can be, tiny models in stages, the demo model.
    """
    agreed: Counter[str] = Counter()
    kinds: list[list[str]] = [[], ["--pipeline"], ["--demo"]]
    while agreed.total() < cases:
        turn, seed = seed % len(kinds), seed + 1
        words = ["--seed", str(seed), "--cases", str(AT_ONCE), *kinds[turn]]
        program = ["-m", "tests.support.together", *words]
        alone = subprocess.run([sys.executable, *program], capture_output=True, text=True)
        leader = launch(processes, program, timeout=1800)[0]
        pairs = list(zip(alone.stdout.splitlines(), leader[1].splitlines(), strict=False))
        wrong = [pair for pair in pairs if pair[0] != pair[1]]
        if wrong or len(pairs) < AT_ONCE:
            print(" ".join(words), *wrong, alone.stderr, leader[2], sep="\n", flush=True)
            return 1
        stages = " in stages" if "--pipeline" in words else ""
        agreed.update(json.loads(one)["family"] + stages for one, _ in pairs)
        print(agreed.total(), "agree:", dict(sorted(agreed.items())), flush=True)
    return 0


def demo_case(number: int, draw: np.random.Generator, *, pipeline: bool) -> dict[str, Any]:
    """Decode a few tokens of an answer of the demo model with its own streams."""
    from mlx_specstream import load

    setting = str(draw.choice([tree for tree in TREES if "inline" not in tree]))
    caching = CACHES[draw.integers(len(CACHES))]
    temp, seed = float(draw.choice([0.0, 0.9])), int(draw.integers(1000))
    model, tokenizer = load("demo", streams="demo-chat", pipeline=pipeline)
    messages = [{"role": "user", "content": str(draw.choice(ASKED))}]
    prompt = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    said = answered(model, tokenizer, prompt, setting, caching, temp, seed)
    case = {"number": number, "family": "demo", "setting": setting, "temp": temp, "cache": caching}
    return {**case, "said": said}


def tiny_case(number: int, draw: np.random.Generator, *, pipeline: bool) -> dict[str, Any]:
    """Decode an answer of a tiny random model of some family, or three of them in a batch."""
    from mlx_specstream import StreamModel, batch_generate
    from mlx_specstream.config import DecodeConfig, StreamConfig
    from mlx_specstream.loading.parallel import divided
    from mlx_specstream.model.backbone import Backbone
    from mlx_specstream.speculation.streams import Streams
    from tests.support.random_streams import linear_modules, random_tensors
    from tests.support.tiny import byte_tokenizer
    from tests.support.tiny_models import tiny_random_model

    tokenizer = byte_tokenizer()
    family = str(draw.choice(FAMILIES))
    setting = str(draw.choice(TREES))
    caching = CACHES[draw.integers(len(CACHES))]
    temp, seed = float(draw.choice([0.0, 0.9])), int(draw.integers(1000))
    mode: Mode = "shared" if draw.random() < 0.25 else "lossless"
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
    tiny = tiny_random_model(family, seed=seed, **wide)
    backbone = divided(tiny, pipeline=pipeline)
    streams = None if number % 8 == 5 else Streams(backbone, config, tensors)
    if streams is None:  # look-up alone, which needs something to find
        setting, prompts[0] = "look-up", 3 * prompts[0]
    model = StreamModel(tiny, backbone, streams)
    case = {"number": number, "family": family, "setting": setting, "mode": mode, "temp": temp}
    case["cache"] = caching
    batched = family in ("llama", "qwen2", "qwen3") and mode == "lossless" and not caching
    several = number % 4 == 3 and batched and ":" not in setting
    if not several:
        said = answered(model, tokenizer, prompts[0], setting, caching, temp, seed)
        return {**case, "said": said}
    decode = DecodeConfig.parse(setting)
    together = batch_generate(model, tokenizer, prompts, max_tokens=12, config=decode)
    return {**case, "said": list(together.texts)}


def answered(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    setting: str,
    caching: dict[str, Any],
    temp: float,
    seed: int,
) -> list[object]:
    """Return an answer's tokens, and how many drafts were accepted.

    Drafts never change the text, so what streams propose shows in what was accepted.
    """
    import mlx.core as mx

    from mlx_specstream import stream_generate
    from mlx_specstream.config import DecodeConfig, SamplingConfig

    mx.random.seed(seed)
    sampling = SamplingConfig(temp=temp, repetition_penalty=1.4)
    answer = stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=20,
        sampler=sampling.sampler(model.backbone.vocab_size, tokenizer),
        logits_processors=sampling.processors(),
        config=None if setting == "look-up" else DecodeConfig.parse(setting),
        **caching,
    )
    responses = list(answer)
    return [[response.token for response in responses], responses[-1].stats.accepted]


if __name__ == "__main__":
    main()
