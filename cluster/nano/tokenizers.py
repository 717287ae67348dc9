"""Tokenizers of the nano models: the first ranks of Mistral's own Tekken vocabulary.

Byte-pair merges are ordered, so the first N of them are a smaller tokenizer of the same kind.
"""

from __future__ import annotations

import base64
import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

SOURCE = "tekken_240911.json"  # ships with mistral_common
NUM_TEKKEN_CONTROL_TOKENS = 1000
HF_CONTROL_TOKENS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<pad>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['content'] is string %}{%- set text = message['content'] %}"
    "{%- else %}{%- set text = message['content'] | map(attribute='text') | join('') %}"
    "{%- endif %}"
    "{%- if message['role'] == 'system' %}{{- '[SYSTEM_PROMPT]' + text + '[/SYSTEM_PROMPT]' }}"
    "{%- elif message['role'] == 'assistant' %}{{- text + eos_token }}"
    "{%- else %}{{- '[INST]' + text + '[/INST]' }}"
    "{%- endif %}"
    "{%- endfor %}"
)


def write_tekken(folder: Path, vocab_size: int, image: dict[str, int] | None = None) -> None:
    """Write `tekken.json` with `vocab_size` tokens, control tokens included.

    Tokenizer version 7, for its system prompts; `image` enables image chunks.
    """
    source = _source()
    vocab = source["vocab"][: vocab_size - NUM_TEKKEN_CONTROL_TOKENS]
    config = source["config"] | {
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": vocab_size,
        "default_num_special_tokens": NUM_TEKKEN_CONTROL_TOKENS,
        "version": "v7",
    }
    tekken = {"config": config, "vocab": vocab} | ({"image": image} if image else {})
    _write_json(folder / "tekken.json", tekken, indent=None)


def write_hf(folder: Path, vocab_size: int, context: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` with `vocab_size` tokens."""
    source = _source()
    tokens, merges = byte_pairs(vocab_size)
    control = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": source["config"]["pattern"]}}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": rank, "content": token, "special": True} | control
            for rank, token in enumerate(HF_CONTROL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                split | {"behavior": "Isolated", "invert": False},
                byte_level | {"use_regex": False},
            ],
        },
        "post_processor": _starts_with_bos(),
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: rank for rank, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    _write_json(folder / "tokenizer.json", tokenizer, indent=None)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", settings, indent=2)


def byte_pairs(vocab_size: int) -> tuple[list[str], list[list[str]]]:
    """Tokens, control tokens first, and the merges that make them, as byte-level BPE writes both."""
    words = [
        base64.b64decode(entry["token_bytes"])
        for entry in _source()["vocab"][: vocab_size - len(HF_CONTROL_TOKENS)]
    ]
    return [*HF_CONTROL_TOKENS, *map(_printable, words)], _merges(words)


def _starts_with_bos() -> dict[str, Any]:
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }


def _merges(words: list[bytes]) -> list[list[str]]:
    """The two tokens that each token was merged from: what is left of it under earlier merges."""
    ranks = {word: rank for rank, word in enumerate(words)}
    merges = []
    for rank, word in enumerate(words):
        if len(word) > 1:
            left, right = _merged_below(word, ranks, rank)
            merges.append([_printable(left), _printable(right)])
    return merges


def _merged_below(word: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], limit) for i in range(len(parts) - 1)]
        best = min(pairs)
        if best >= limit:
            break
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


@cache
def _alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte, which `ByteLevel` expects."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _printable(word: bytes) -> str:
    return "".join(_alphabet()[byte] for byte in word)


def _source() -> dict[str, Any]:
    text = (resources.files("mistral_common") / "data" / SOURCE).read_text("utf-8")
    tekken: dict[str, Any] = json.loads(text)
    return tekken


def _write_json(path: Path, value: object, *, indent: int | None) -> None:
    separators = (",", ": ") if indent else (",", ":")
    path.write_text(
        json.dumps(value, indent=indent, separators=separators, ensure_ascii=False) + "\n", "utf-8"
    )
