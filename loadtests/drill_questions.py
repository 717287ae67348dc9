"""What the drill asks: every form of streamed request whose answer must survive an engine."""

from __future__ import annotations

import random
from typing import Any

from loadtests.stream_check import Question

_WORDS = [
    "The",
    "bora",
    "falls",
    "from",
    "the",
    "plateau",
    "to",
    "the",
    "sea,",
    "clears",
    "the",
    "sky",
    "within",
    "an",
    "hour",
    "and",
    "turns",
    "every",
    "umbrella",
    "of",
    "Trieste",
    "inside",
    "out:",
    "é,",
    "€,",
    "海,",
    "🌊.",
    "What",
    "should",
    "a",
    "careful",
    "captain",
    "do",
    "before",
    "it",
    "comes?",
]


def questions(count: int, *, model: str, max_tokens: int, seed: int = 7) -> list[Question]:
    """`count` different questions, half of them chats, greedy, of varied length.

    Among them are answers that end by themselves, at their limit, and at a stop string, with and
    without usage, and with token ids: each has its own way to go wrong at a change of engines.
    """
    randomness = random.Random(seed)  # noqa: S311 - the same questions in every run
    return [_question(number, randomness, model, max_tokens) for number in range(count)]


def _question(number: int, randomness: random.Random, model: str, max_tokens: int) -> Question:
    text = " ".join([f"{number}:", *randomness.choices(_WORDS, k=randomness.randint(4, 60))])
    limit = randomness.randint(max_tokens // 2, max_tokens)
    body: dict[str, Any] = {"model": model, "stream": True, "temperature": 0, "max_tokens": limit}
    form = number % 8
    if form in (0, 1, 2, 3):
        body["ignore_eos"] = True
    if form in (4, 5):
        body["min_tokens"] = limit // 2
    if form in (2, 3, 6):
        body["stop"] = ["moon", "storm tide"]  # the engine holds 9 characters back
    if form != 1:
        body["stream_options"] = {"include_usage": True}
    if form in (0, 3):
        body["return_token_ids"] = True
    chat = number % 16 < 8  # so that each form is asked both ways
    if chat:
        messages = [{"role": "user", "content": text}]
        if form == 5:
            messages.insert(0, {"role": "system", "content": "Answer in one sentence."})
        return Question(chat, {**body, "messages": messages})
    return Question(chat, {**body, "prompt": text})
