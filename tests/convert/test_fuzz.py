"""Damaged and hostile files: an error in one sentence, never a crash, a hang, or a large allocation.

python -m tests.convert.test_fuzz 20000      the long run; the suite runs a short seeded one
"""

import json
import random
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mlx_specstream.convert.configs import base_config, peft_adapter, stream_config
from mlx_specstream.convert.reader import open_checkpoint, read_json, read_weight_file
from mlx_specstream.errors import SpecStreamError
from mlx_specstream.weights.checkpoint import load_streams
from mlx_specstream.weights.tensorfile import TensorSpec, TensorWriter
from tests.convert import torch_files
from tests.convert.gguf.made import write_tiny_gguf
from tests.convert.torch_files import Call

SLOWEST_S = 5.0
LARGEST_GROWTH_KB = 300 << 10
WORDS = [
    b"0",
    b"-1",
    b"9" * 30,
    b"1e999",
    b"NaN",
    b"null",
    b'"x"',
    b"[]",
    b"{}",
    b"[" * 2000,
    b'"\\ud800"',
]


def safetensors_seed(folder):
    path = folder / "seed.safetensors"
    specs = [
        TensorSpec("a.weight", "F32", (4, 3)),
        TensorSpec("b", "BF16", (5,)),
        TensorSpec("c", "I64", ()),
    ]
    with TensorWriter(path, specs, {"format": "pt"}) as writer:
        writer.write(np.ones((4, 3), np.float32))
        writer.write(np.ones(5, np.uint16))
        writer.write(np.array(7, np.int64))
    return path.read_bytes()


def torch_seed(folder, legacy):
    """Return what torch.save writes for a trainer's small file."""
    state = {"a.weight": np.ones((4, 3), np.float32), "b": np.ones(5, np.float16)}
    beside = Call("argparse.Namespace", ((),), {"lr": 1e-3})
    value = {"state_dict": state, "step": 3, "args": beside, "seen": Call("builtins.set", ([1],))}
    return torch_files.save(value, folder / "seed.bin", legacy=legacy).read_bytes()


def json_seed():
    return json.dumps(
        {
            "schema": 1, "version": 1, "model_type": "llama", "num_hidden_layers": 3, "hidden_size": 64,
            "num_streams": 3, "num_msa_layers": 2, "mode": "lossless", "lora_rank": 4, "lora_alpha": 8.0,
            "target_modules": ["self_attn.q_proj"], "stream_init": "identity", "peft_type": "LORA",
            "r": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "weight_map": {"a.weight": "model.safetensors"},
        }
    ).encode()  # fmt: skip


def mutate(data, generator):
    """Return `data` with a few bytes, runs, words or the length changed.

    Mostly near the structure.
    """
    data = bytearray(data)
    for _ in range(generator.choice([1, 1, 1, 2, 4, 16])):
        at = generator.randrange(len(data)) if data else 0
        kind = generator.randrange(7)
        if kind == 0 and data:
            data[at] ^= 1 << generator.randrange(8)
        elif kind == 1 and data:
            data[at] = generator.choice([0, 1, 0x2E, 0x52, 0x62, 0x63, 0x7F, 0x80, 0xFF])
        elif kind == 2:
            del data[at : at + generator.choice([1, 2, 8, 100])]
        elif kind == 3:
            run = bytes(data[at : at + generator.choice([1, 4, 16, 64])])
            data[at:at] = run * generator.choice([1, 2, 50])
        elif kind == 4:
            data[at : at + 8] = struct.pack(
                "<q", generator.choice([-1, 0, 1, 1 << 31, 1 << 62, len(data)])
            )
        elif kind == 5:
            data[at : at + generator.choice([1, 3, 8])] = generator.choice(WORDS)
        else:
            del data[generator.randrange(len(data) + 1) :]
    return bytes(data)


def read_weights(path):
    for tensor in read_weight_file(path).values():
        assert tensor.nbytes < 1 << 24
        tensor.read()


def read_gguf(path):
    for tensor in open_checkpoint(path).tensors.values():
        assert tensor.nbytes < 1 << 24
        tensor.read()


def read_configs(path):
    fields = read_json(path)
    for use in (
        lambda: base_config(fields, path),
        lambda: stream_config(fields, {}, path),
        lambda: peft_adapter(fields, path),
    ):
        try:
            use()
        except SpecStreamError as error:
            assert_sentence(error)


def read_index(path):
    folder = path.parent / "indexed"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_bytes(path.read_bytes())
    open_checkpoint(folder)


def read_streams(path):
    folder = path.parent / "streams"
    folder.mkdir(exist_ok=True)
    (folder / "streams_config.json").write_bytes(path.read_bytes())
    (folder / "streams.safetensors").write_bytes(safetensors_seed_cached(path.parent))
    load_streams(folder)


def safetensors_seed_cached(folder, cache={}):  # noqa: B006
    if "seed" not in cache:
        made = folder / "made"
        made.mkdir(exist_ok=True)
        cache["seed"] = safetensors_seed(made)
    return cache["seed"]


def assert_sentence(error):
    text = str(error)
    assert "\n" not in text
    assert 10 < len(text) < 1200, text


def fuzz(folder, cases, seed):
    """Run `cases` mutations over all kinds of files; return how many were refused."""
    seeds = [
        ("x.safetensors", safetensors_seed_cached(folder), read_weights),
        ("x.bin", torch_seed(folder, legacy=False), read_weights),
        ("x.pt", torch_seed(folder, legacy=True), read_weights),
        ("x.gguf", write_tiny_gguf(folder / "seed.gguf").read_bytes(), read_gguf),
        ("x.json", json_seed(), read_configs),
        ("i.json", json_seed(), read_index),
        ("s.json", json_seed(), read_streams),
    ]
    generator, refused = random.Random(seed), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(cases):
        name, data, read = seeds[case % len(seeds)]
        path = folder / name
        mutated = mutate(data, generator)
        path.write_bytes(mutated)
        started = time.process_time()
        try:
            read(path)
        except SpecStreamError as error:
            refused += 1
            assert_sentence(error)
        except Exception:
            (folder / f"crash-{seed}-{case}-{name}").write_bytes(mutated)
            raise
        assert time.process_time() - started < SLOWEST_S, (seed, case)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < LARGEST_GROWTH_KB, grown
    return refused


def test_mutated_files_are_refused_in_a_sentence(tmp_path):
    assert fuzz(tmp_path, cases=1200, seed=0) > 600


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        total = int(sys.argv[1])
        started = time.process_time()
        print("refused", fuzz(Path(name), total, seed=1), "of", total)
        print("CPU seconds", round(time.process_time() - started))
