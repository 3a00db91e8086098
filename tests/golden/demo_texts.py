"""A few hundred varied texts for tokenizers: prose, code, digits, spaces, Unicode, special tokens. Seeded, our own."""

from __future__ import annotations

import random

SENTENCES = (
    "The capital of France is Paris.",
    "It's what we'd've said, isn't it? They'll come; I'm sure you're right.",
    "In 1969, 2 people walked on the Moon; by 1972 there were 12.",
    "Total: $1,234.56 (incl. 19% VAT) -- see pp. 10-12.",
    "1. Mix\n2. Bake at 180 C\n3. Wait 25 minutes\n\n4. Eat",
    "Steps:\n\n1. first\n\n2. second\n\n   10. tenth",
    "def add(a: int, b: int) -> int:\n    return a + b  # 2 + 2 == 4\n",
    'for i in range(10):\n\tprint(f"{i:03d}", end=" ")\n\n\nclass A:\n    x = 0x1F\n',
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name;",
    '{"key": [1, 2.5, -3e8, null, true], "nested": {"a": "b"}}',
    "<div class='a'>&nbsp;</div>\n<!-- note -->\r\n",
    "C'est l'été, où êtes-vous? Größe: 5 µm; naïve façade. Łódź, Çankırı.",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم ١٢٣",
    "你好，世界。今日は世界。안녕하세요 세계! ที่นี่",
    "Emoji: 😀 👩‍👩‍👧‍👦 🇫🇷 ❤️ 👍🏽 and back to text 🙂.",
    "x² + y² = z²; ½ + ¼ = ¾; Ⅷ and ٣ are numbers too; 10⁻³",
    "zero\u200bwidth, nbsp\u00a0here, bom\ufeff, combining e\u0301 vs \u00e9",
    "tabs\there\t\tand  two   three    four spaces   ",
    "   leading, trailing   \n  \n\n\n   ",
    "https://example.org/a/b?c=1&d=%20#frag user@example.org C:\\path\\file_01.txt",
    "SCREAMING snake_case camelCase PascalCase kebab-case v1.2.3-rc4",
    "a" * 70 + " " + "1" * 40 + " " + "!" * 20 + " " + "ab12" * 10,
)
SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>", "<|im_sta", "<|IM_END|>")
LETTERS = "aeioutnsr  \n\t.,'\"-_()=<>|/\\0123456789ABCéßñ世界😀🙂\u0301½²٣\r"


def demo_texts() -> list[str]:
    """Return 300 texts: the sentences, pieces and mixtures of them, and noise; always the same."""
    draw = random.Random(20)
    texts = ["", " ", "\n", "\n\n", "  1", *SENTENCES, *SPECIALS]
    while len(texts) < 160:
        one, two = draw.choice(SENTENCES), draw.choice(SENTENCES)
        start, stop = sorted(draw.sample(range(len(one) + 1), 2))
        texts.append(one[start:stop] + draw.choice(["", " ", "\n\n", *SPECIALS]) + two[:stop])
    while len(texts) < 300:
        texts.append("".join(draw.choice(LETTERS) for _ in range(draw.randint(1, 60))))
    return texts


CHATS = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "2 + 2?\n\n1) three\n2) four"},
    ],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": " Tell me a joke  😀 "},
    ],
)
"""Conversations for the chat template."""

LOGIT_PROMPTS = (0, 1, 2)
"""Which of `CHATS` logits are compared for."""
