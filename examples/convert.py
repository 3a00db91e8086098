"""Take streams to PyTorch's format and back, and compare them tensor by tensor.

    python examples/convert.py --streams my-streams --model YOURS --output converted

The way back is what a checkpoint of your own takes: a folder with `speculative_streaming.json` and
`stream_model.safetensors` (docs/checkpoint-format.md) becomes a model folder of mlx-lm with streams.
PyTorch need not be installed.
"""

import argparse
from pathlib import Path

import mlx.core as mx

from mlx_specstream import cli
from mlx_specstream.loading.folders import model_folder
from mlx_specstream.weights.shipped import SHIPPED


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert streams to PyTorch's format and back.")
    parser.add_argument("--model", default="demo", help="folder, hub id, or demo")
    parser.add_argument("--streams", default=str(SHIPPED / "demo-chat"), help="folder of streams")
    parser.add_argument("--output", default="converted", help="folder to write, with two in it")
    options = parser.parse_args()

    theirs, ours = (str(Path(options.output) / name) for name in ("pytorch", "mlx"))
    run("--to-pytorch", "--hf-path", options.streams, "--mlx-path", theirs)
    base = str(model_folder(options.model))
    run("--hf-path", theirs, "--base", base, "--mlx-path", ours, "--adapter-only")

    before, after = tensors(options.streams), tensors(ours)
    same = before.keys() == after.keys() and all(
        mx.array_equal(tensor, after[name]) for name, tensor in before.items()
    )
    print(f"{len(before)} tensors, {'all the same' if same else 'NOT the same'} after both ways")
    raise SystemExit(0 if same else 1)


def tensors(folder: str) -> dict[str, mx.array]:
    """Return the streams of a folder by name."""
    found = mx.load(str(Path(folder) / "streams.safetensors"))
    assert isinstance(found, dict)
    return found


def run(*words: str) -> None:
    """Run `specstream convert`; what was wrong with it has been printed."""
    print(f"$ specstream convert {' '.join(words)}", flush=True)
    if status := cli.main(["convert", *words]):
        raise SystemExit(status)


if __name__ == "__main__":
    main()
