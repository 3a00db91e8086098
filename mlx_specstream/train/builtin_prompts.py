"""Two hundred built-in prompts, to try distillation and training without any data of one's own.

Ten kinds of request, each about every one of twenty subjects. Enough to see streams learn; for
streams that are to be used, distil prompts like those they will meet.
"""

from __future__ import annotations

from .data import Record

BUILTIN = "starter"
"""What `--data` calls them."""

REQUESTS = (
    "Explain {} to a twelve-year-old in a few sentences.",
    "Write a short note to a colleague about {}.",
    "List five things that one should know about {}.",
    "What are common mistakes people make with {}?",
    "Give a step-by-step plan to learn more about {}.",
    "Summarise why {} matters, in three sentences.",
    "Write a short dialogue in which two friends talk about {}.",
    "What questions would you ask an expert on {}?",
    "Compare {} today with {} a hundred years ago.",
    "Write a Python function that prints three facts about {}.",
)

SUBJECTS = (
    "bicycles", "bread baking", "the night sky", "public libraries", "saving water",
    "chess", "house plants", "trains", "sleep", "maps",
    "music lessons", "small gardens", "recycling", "letters", "rivers",
    "first aid", "weather forecasts", "museums", "running", "computers",
)  # fmt: skip


def builtin_records() -> list[Record]:
    """Return the prompts as records; neighbours differ in kind and subject."""
    texts = [
        request.format(*[SUBJECTS[(turn + 7 * number) % len(SUBJECTS)]] * request.count("{}"))
        for turn in range(len(SUBJECTS))
        for number, request in enumerate(REQUESTS)
    ]
    return [
        Record({"prompt": text}, f"{BUILTIN}, prompt {number}")
        for number, text in enumerate(texts, start=1)
    ]
