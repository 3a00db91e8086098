"""Train streams for a model, from its own answers, and say what they give.

    python examples/train.py --iters 100                       # the demo model, built-in prompts
    python examples/train.py --model YOURS --data prompts.jsonl --output my-streams

The two commands it runs are `specstream distill` and `specstream train`; both go on where they were
stopped when the script is started again.
"""

import argparse
from pathlib import Path

from mlx_specstream import cli, load, stream_generate


def main() -> None:
    parser = argparse.ArgumentParser(description="Train streams from a model's own answers.")
    parser.add_argument("--model", default="demo", help="folder, hub id, or demo")
    parser.add_argument("--data", default="starter", help="prompts; starter: 200 built-in ones")
    parser.add_argument("--output", default="my-streams", help="folder for the streams")
    parser.add_argument("--iters", type=int, default=100, help="batches of four texts")
    parser.add_argument("--max-tokens", type=int, default=96, help="most tokens of an answer")
    options = parser.parse_args()

    answers = f"{options.output}.jsonl"
    model = ["--model", options.model]
    run(
        "distill", *model, "--data", options.data, "--output", answers,
        "--max-tokens", str(options.max_tokens),
    )  # fmt: skip
    run(
        "train", *model, "--data", answers, "--adapter-path", options.output,
        "--iters", str(options.iters), "--batch-size", "4", "--resume",
    )  # fmt: skip

    joined, tokenizer = load(options.model, streams=Path(options.output))
    prompt = tokenizer.encode("Write a short note about bicycles.")
    *_, last = stream_generate(joined, tokenizer, prompt, max_tokens=options.max_tokens)
    print(last.stats)


def run(*words: str) -> None:
    """Run a verb of specstream; what was wrong with it has been printed."""
    print(f"$ specstream {' '.join(words)}", flush=True)
    if status := cli.main(words):
        raise SystemExit(status)


if __name__ == "__main__":
    main()
