"""Answer one prompt, with every token that a stream had proposed in brackets, then the figures.

python examples/api.py --prompt "Write a haiku about rain."
"""

import argparse

from mlx_specstream import load, stream_generate


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer one prompt.")
    parser.add_argument("--model", default="demo", help="folder, hub id, or demo")
    parser.add_argument("--prompt", default="Why is the sky blue?")
    parser.add_argument("--max-tokens", type=int, default=100)
    options = parser.parse_args()

    model, tokenizer = load(options.model)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": options.prompt}], add_generation_prompt=True
    )
    for response in stream_generate(model, tokenizer, prompt, max_tokens=options.max_tokens):
        # origin: 0 for the model's own token, else the stream that had proposed it.
        shown = f"[{response.text}]" if response.origin else response.text
        print(shown, end="", flush=True)
    print(f"\n{response.stats}")


if __name__ == "__main__":
    main()
