"""Answer several prompts at once: one pass of the model serves them all.

python examples/batch.py "Name three rivers." "What is 7 times 8?"
"""

import argparse

from mlx_specstream import batch_generate, load

PROMPTS = ["Name three rivers.", "What is a prime number?", "Say hello in French."]


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer several prompts at once.")
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--model", default="demo", help="folder, hub id, or demo")
    parser.add_argument("--max-tokens", type=int, default=60)
    options = parser.parse_args()

    model, tokenizer = load(options.model)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True
        )
        for prompt in options.prompts
    ]
    answers = batch_generate(model, tokenizer, prompts, max_tokens=options.max_tokens)
    for prompt, text in zip(options.prompts, answers.texts, strict=True):
        print(f"{prompt}\n    {text}\n")
    print(answers.stats)


if __name__ == "__main__":
    main()
