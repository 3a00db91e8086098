"""Ask a running server and print the answer as it comes; needs nothing but Python.

    specstream serve &
    python examples/client.py "Why is the sky blue?"

Any client of OpenAI's API does the same; this one shows what goes over the wire.
"""

import argparse
import json
import os
import urllib.request


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a running server.")
    parser.add_argument("prompt", nargs="?", default="Why is the sky blue?")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--max-tokens", type=int, default=100)
    options = parser.parse_args()

    body = {
        "messages": [{"role": "user", "content": options.prompt}],
        "max_tokens": options.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{options.url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    if key := os.environ.get("SPECSTREAM_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    with urllib.request.urlopen(request) as reply:
        for line in reply:  # server-sent events: one line of data each, empty lines between
            data = line.decode().removeprefix("data: ").strip()
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            for choice in event["choices"]:
                print(choice["delta"].get("content") or "", end="", flush=True)
            if usage := event.get("usage"):
                print(f"\n{json.dumps(usage)}")


if __name__ == "__main__":
    main()
