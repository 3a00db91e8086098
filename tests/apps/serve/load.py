"""A crowd against a server of its own: many clients, some of them rude, for a while.

    python -m tests.apps.serve.load --model demo --streams demo-chat --clients 32 --seconds 300

Polite clients ask greedily or with a seed, whole or streamed, and compare what they get with what
one client alone had got before. Others leave in the middle, or send nonsense or far too much. In the
end the server must live, owe nobody anything, have grown by no more than its caches, and give
the same answers as in the beginning. Prints the figures, as JSON and as the table in
docs/server.md; exits 1 if anything is amiss.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx2
import psutil

CHAT = "/v1/chat/completions"
QUESTIONS = (
    "Why is the sky blue?",
    "Write a sentence about a cat.",
    "What is the capital of France?",
    "Give me three colours.",
    "How do I boil an egg?",
    "Tell me a short story about a ship.",
    "What is 12 times 12?",
    "Explain rain to a child.",
)
SYSTEM = "You answer briefly."
NONSENSE = (
    b"",
    b"{",
    b"[" * 200_000,
    b'{"messages": NaN}',
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
    b'{"messages": [{"role": "user", "content": "x"}], "model": "another"}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b"\xff\x00\xfe",
)
GROWTH = 1.15  # of the memory after a third of the time
GROWTH_BYTES = 64 * 2**20


@dataclass
class Tally:
    """What the clients saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    tokens: int = 0
    left: int = 0
    nonsense: int = 0
    oversized: int = 0
    wrong: list[str] = field(default_factory=list)


def bodies(max_tokens: int) -> list[dict[str, Any]]:
    """Return what polite clients ask: every question greedily, and with a seed."""
    made = []
    for number, question in enumerate(QUESTIONS):
        system = [{"role": "system", "content": SYSTEM}] if number % 2 else []
        messages = [*system, {"role": "user", "content": question}]
        made.append({"messages": messages, "max_tokens": max_tokens})
        if number < 4:
            drawn = {"temperature": 0.8, "top_p": 0.95, "seed": number}
            made.append({"messages": messages, "max_tokens": max_tokens, **drawn})
    return made


async def answer(client: httpx2.AsyncClient, body: dict[str, Any], tally: Tally | None) -> str:
    """Return the text of an answer, streamed if the body says so; an error's text begins with !."""
    began = time.monotonic()
    if not body.get("stream"):
        response = await client.post(CHAT, json=body)
        note(tally, response.status_code)
        if response.status_code != 200:
            return f"!{response.status_code}"
        reply = response.json()
        if tally is not None:
            tally.tokens += reply["usage"]["completion_tokens"]
        return str(reply["choices"][0]["message"]["content"])
    text, started = "", False
    asked = {**body, "stream_options": {"include_usage": True}}
    async with client.stream("POST", CHAT, json=asked) as response:
        note(tally, response.status_code)
        if response.status_code != 200:
            return f"!{response.status_code}"
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                return f"!{chunk['error']['message']}"
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
            if text and not started and tally is not None:
                started = True
                tally.first.append(time.monotonic() - began)
            if chunk.get("usage") and tally is not None:
                tally.tokens += chunk["usage"]["completion_tokens"]
    return text


def note(tally: Tally | None, status: int) -> None:
    if tally is not None:
        tally.statuses[str(status)] += 1


async def client_loop(
    client: httpx2.AsyncClient,
    asked: list[dict[str, Any]],
    alone: list[str],
    until: float,
    tally: Tally,
    dice: random.Random,
) -> None:
    """Be one client: mostly polite."""
    while time.monotonic() < until:
        throw = dice.random()
        if throw < 0.1:
            body = {**dice.choice(asked), "stream": dice.random() < 0.5, "max_tokens": 500}
            try:
                await asyncio.wait_for(answer(client, body, None), dice.uniform(0.01, 2))
            except asyncio.TimeoutError:
                tally.left += 1
        elif throw < 0.2:
            headers = {"Content-Type": "application/json"}
            nonsense = dice.choice(NONSENSE)
            response = await client.post(CHAT, content=nonsense, headers=headers)
            note(tally, response.status_code)
            tally.nonsense += 1
            if response.status_code not in (400, 404):
                tally.wrong.append(f"nonsense got {response.status_code}: {response.text[:200]}")
        elif throw < 0.22:
            response = await oversized(client)
            note(tally, response)
            tally.oversized += 1
            if response != 413:
                tally.wrong.append(f"an oversized request got {response}")
        else:
            await polite(client, asked, alone, tally, dice)


async def oversized(client: httpx2.AsyncClient) -> int:
    body = b'{"messages": "' + b"x" * (3 * 2**20) + b'"}'
    try:
        response = await client.post(
            CHAT, content=body, headers={"Content-Type": "application/json"}
        )
    except (httpx2.WriteError, httpx2.ReadError, httpx2.RemoteProtocolError):
        return 413  # refused before all of it was sent
    return response.status_code


async def polite(
    client: httpx2.AsyncClient,
    asked: list[dict[str, Any]],
    alone: list[str],
    tally: Tally,
    dice: random.Random,
) -> None:
    place = dice.randrange(len(asked))
    began = time.monotonic()
    text = await answer(client, {**asked[place], "stream": dice.random() < 0.5}, tally)
    if text == "!429":
        await asyncio.sleep(dice.uniform(0.2, 1.0))
    elif text != alone[place]:
        tally.wrong.append(f"{asked[place]} gave {text!r}, alone {alone[place]!r}")
    else:
        tally.waits.append(time.monotonic() - began)


async def crowd(url: str, process: psutil.Process, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of the whole run."""
    limits = httpx2.Limits(max_connections=None)
    asked = bodies(options.max_tokens)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        began = time.monotonic()
        counted = Tally()
        alone = [await answer(client, body, counted) for body in asked]
        alone_s = time.monotonic() - began
        tally, memory = Tally(), []
        start = time.monotonic()
        until = start + options.seconds
        loops = [
            asyncio.ensure_future(
                client_loop(client, asked, alone, until, tally, random.Random(seed))
            )
            for seed in range(options.clients)
        ]
        while any(not loop.done() for loop in loops):
            await asyncio.wait(loops, timeout=min(5, options.seconds / 10))
            memory.append((time.monotonic() - start, process.memory_info().rss))
        took = time.monotonic() - start
        for loop in loops:
            loop.result()
        again = [await answer(client, body, None) for body in asked]
        figures = metrics((await client.get("/metrics")).text)
    third = [rss for at, rss in memory if at <= options.seconds / 3][-1:] or [memory[0][1]]
    return {
        "clients": options.clients,
        "seconds": round(took, 1),
        "statuses": dict(sorted(tally.statuses.items())),
        "answers": len(tally.waits),
        "left_early": tally.left,
        "nonsense": tally.nonsense,
        "oversized": tally.oversized,
        "turned_away": tally.statuses["429"],
        "tokens_per_s": round(tally.tokens / took, 1),
        "alone_tokens_per_s": round(counted.tokens / alone_s, 1),
        "answer_s": spread(tally.waits),
        "first_token_s": spread(tally.first),
        "rss_mb": {
            "after_a_third": round(third[0] / 2**20),
            "end": round(memory[-1][1] / 2**20),
            "peak": round(max(rss for _, rss in memory) / 2**20),
        },
        "tokens_per_pass": round(
            figures["specstream_generated_tokens_total"] / figures["specstream_passes_total"], 2
        ),
        "prompt_tokens_from_cache": round(
            figures["specstream_cached_tokens_total"] / figures["specstream_prompt_tokens_total"], 3
        ),
        "wrong": tally.wrong[:10],
        "faults": faults(tally, alone, again, figures, third[0], memory[-1][1]),
    }


def faults(
    tally: Tally,
    alone: list[str],
    again: list[str],
    figures: dict[str, float],
    third: int,
    end: int,
) -> list[str]:
    """Return what is amiss."""
    found = []
    if tally.wrong:
        found.append(f"{len(tally.wrong)} answers were wrong")
    if any(status.startswith("5") for status in tally.statuses):
        found.append("the server failed a request")
    if any(text.startswith("!") for text in alone):
        found.append("a single client was refused")
    if alone != again:
        found.append("a single client got other answers afterwards")
    if figures["specstream_active_answers"] or figures["specstream_waiting_answers"]:
        found.append("answers are left over")
    if end > GROWTH * third + GROWTH_BYTES:
        found.append("memory grew")
    return found


def metrics(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def spread(values: list[float]) -> dict[str, float]:
    """Return median, 95th percentile and maximum."""
    if not values:
        return {}
    ranked = sorted(values)
    return {
        "median": round(ranked[len(ranked) // 2], 2),
        "p95": round(ranked[int(0.95 * (len(ranked) - 1))], 2),
        "max": round(ranked[-1], 2),
    }


def table(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""

    def seconds(name: str) -> str:
        found = figures[name]
        return f"{found['median']} / {found['p95']} / {found['max']} s" if found else "none"

    memory = figures["rss_mb"]
    rows = (
        ("clients, seconds", f"{figures['clients']}, {figures['seconds']:g}"),
        ("answers, each as one client alone got it", figures["answers"]),
        ("answers that differed", len(figures["wrong"])),
        ("turned away with 429", figures["turned_away"]),
        ("left in the middle", figures["left_early"]),
        ("nonsense refused (400, 404)", figures["nonsense"]),
        ("too large, refused (413)", figures["oversized"]),
        ("to the first token: median / 95th percentile / longest", seconds("first_token_s")),
        ("to the end of the answer: the same", seconds("answer_s")),
        (
            "tokens per second, all clients; one client alone",
            f"{figures['tokens_per_s']}; {figures['alone_tokens_per_s']}",
        ),
        ("tokens per pass", figures["tokens_per_pass"]),
        ("prompt tokens that a cache held", f"{figures['prompt_tokens_from_cache']:.0%}"),
        (
            "memory of the process after a third of the time, at the end",
            f"{memory['after_a_third']}, {memory['end']} MiB",
        ),
        ("told to stop, ended after", f"{figures['stopped_s']} s"),
    )
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.apps.serve.load")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", default="auto")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--max-tokens", type=int, default=24)
    options, more = parser.parse_known_args(argv)
    command = [sys.executable, "-m", "mlx_specstream.cli", "serve", "--port", "0"]
    command += ["--model", options.model, "--streams", options.streams]
    command += ["--max-queue", "16", "--prompt-cache-bytes", str(64 * 2**20), *more]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert server.stdout is not None
    try:
        url = next(
            line.split(" at ")[1].split(";")[0].strip() for line in server.stdout if " at " in line
        )
        figures = asyncio.run(crowd(url, psutil.Process(server.pid), options))
        server.send_signal(signal.SIGTERM)
        began = time.monotonic()
        status = server.wait(60)
        figures["stopped_s"] = round(time.monotonic() - began, 1)
        if status:
            figures["faults"].append(f"the server ended with status {status}")
    finally:
        server.kill()
    print(json.dumps(figures, indent=2, ensure_ascii=False))
    print(table(figures))
    return 1 if figures["faults"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
