"""Whether a streamed answer is what it should be: well-formed, and equal to an undisturbed one.

Pure: chunks go in (from HTTP or gRPC), problems come out.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtests.sse import DONE, Event

# A word with the space before it, or one sign: about what tokens are, for counting.
_PIECES = re.compile(r"\s?[A-Za-z0-9]+[.,]?|.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Question:
    """One request. `body` is OpenAI's; `chat` or a completion."""

    chat: bool
    body: dict[str, Any]

    @property
    def path(self) -> str:
        """Where it is sent."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @property
    def form(self) -> str:
        """What is special about it, for reports."""
        names = ("stop", "min_tokens", "ignore_eos", "return_token_ids", "stream_options")
        asked = [name for name in names if self.body.get(name)]
        return ", ".join(["chat" if self.chat else "completion", *asked])

    @property
    def wants_usage(self) -> bool:
        """An event with the usage must come."""
        return bool((self.body.get("stream_options") or {}).get("include_usage"))

    @property
    def wants_ids(self) -> bool:
        """Token ids must come; else none may."""
        return bool(self.body.get("return_token_ids"))


@dataclass(slots=True)
class Seen:
    """An answer as its client sees it. `problems`: what is malformed, or why there is no more."""

    text: str = ""
    finish_reason: str | None = None
    stop_reason: Any = None
    usage: tuple[int, int] | None = None  # tokens in, tokens out
    token_ids: list[int] = field(default_factory=list)
    prompt_token_ids: list[int] | None = None
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an answer differs from the undisturbed one. Empty `problems`: it does not."""

    problems: tuple[str, ...]
    duplicated_tokens: int = 0
    missing_tokens: int = 0


def read_events(events: Sequence[Event], question: Question) -> Seen:
    """What a whole HTTP stream said: JSON events and one end mark, at the end."""
    chunks: list[dict[str, Any]] = []
    problems = []
    for number, event in enumerate(events):
        if event.data == DONE:
            if number != len(events) - 1:
                problems.append(f"{DONE} is not the last event")
            continue
        try:
            chunk = json.loads(event.data)
        except ValueError:
            problems.append(f"an event is not JSON: {event.data[:80]}")
            continue
        if not isinstance(chunk, dict) or event.name == "error" or "error" in chunk:
            problems.append(f"error event: {event.data[:200]}")
            continue
        chunks.append(chunk)
    count = sum(event.data == DONE for event in events)
    if count != 1:
        problems.append(f"{count} end marks")
    seen = read_chunks(chunks, question)
    seen.problems = problems + seen.problems
    return seen


def read_chunks(chunks: Sequence[dict[str, Any]], question: Question) -> Seen:
    """What the chunks of a stream said. One choice is expected."""
    seen = Seen()
    for name in ("id", "model", "created"):
        values = {chunk.get(name) for chunk in chunks}
        if len(values) > 1:
            seen.problems.append(f"{name} changes within the stream: {sorted(map(str, values))}")
    if chunks and chunks[0].get("model") != question.body["model"]:
        seen.problems.append(f"model is {chunks[0].get('model')!r}")
    roles = 0
    for number, chunk in enumerate(chunks):
        if chunk.get("prompt_token_ids") is not None:
            _note_prompt(seen, chunk["prompt_token_ids"], number)
        for choice in chunk.get("choices") or ():
            roles += _read_choice(seen, choice, number)
        if chunk.get("usage"):
            _read_usage(seen, chunk, is_last=number == len(chunks) - 1)
    if question.chat and roles != 1:
        seen.problems.append(f"{roles} events give the role")
    if seen.finish_reason is None:
        seen.problems.append("no finish_reason")
    _check_extras(seen, question)
    return seen


def _read_choice(seen: Seen, choice: dict[str, Any], number: int) -> int:
    """Returns 1 if the choice gives the role."""
    said = choice.get("delta", choice)
    text = said.get("content") or said.get("text") or ""
    if seen.finish_reason is not None:
        seen.problems.append("an event after the one with finish_reason")
    seen.text += text
    seen.token_ids += choice.get("token_ids") or ()
    if choice.get("prompt_token_ids") is not None:
        _note_prompt(seen, choice["prompt_token_ids"], number)
    if choice.get("finish_reason"):
        seen.finish_reason = choice["finish_reason"]
        seen.stop_reason = choice.get("stop_reason")
    has_role = bool(said.get("role"))
    if has_role and number != 0:
        seen.problems.append("the role comes late")
    return int(has_role)


def _note_prompt(seen: Seen, ids: list[int], number: int) -> None:
    if number != 0 or seen.prompt_token_ids is not None:
        seen.problems.append("prompt_token_ids outside of the first event")
    else:
        seen.prompt_token_ids = ids


def _read_usage(seen: Seen, chunk: dict[str, Any], *, is_last: bool) -> None:
    usage = chunk["usage"]
    if chunk.get("choices") or not is_last or seen.usage is not None:
        seen.problems.append("usage outside of the last event")
    tokens_in, tokens_out = usage.get("prompt_tokens"), usage.get("completion_tokens")
    seen.usage = tokens_in, tokens_out
    if usage.get("total_tokens") != (tokens_in or 0) + (tokens_out or 0):
        seen.problems.append(f"usage does not add up: {usage}")


def _check_extras(seen: Seen, question: Question) -> None:
    if (seen.usage is not None) != question.wants_usage:
        seen.problems.append("no usage" if question.wants_usage else "usage that nobody asked for")
    has_ids = bool(seen.token_ids or seen.prompt_token_ids)
    if has_ids and not question.wants_ids:
        seen.problems.append("token ids that nobody asked for")


def compare(seen: Seen, reference: Seen) -> Verdict:
    """`seen` against the undisturbed answer to the same question.

    Tokens are counted as words and signs of the text, or by their ids where the client has them.
    """
    problems = list(seen.problems)
    duplicated, missing = _text_differences(seen.text, reference.text)
    if seen.text != reference.text:
        problems.append(f"text differs: {duplicated} tokens too many, {missing} missing")
    if seen.token_ids != reference.token_ids:
        more, fewer = _differences(seen.token_ids, reference.token_ids)
        problems.append(f"token ids differ: {more} too many, {fewer} missing")
        duplicated, missing = max(duplicated, more), max(missing, fewer)
    for name in ("finish_reason", "stop_reason", "usage", "prompt_token_ids"):
        one, other = getattr(seen, name), getattr(reference, name)
        if one != other:
            problems.append(f"{name} is {one}, undisturbed {other}"[:200])
    return Verdict(tuple(problems), duplicated, missing)


def _text_differences(seen: str, reference: str) -> tuple[int, int]:
    if reference.startswith(seen):  # also in the middle of what counts as one
        return 0, len(_PIECES.findall(reference[len(seen) :]))
    return _differences(_PIECES.findall(seen), _PIECES.findall(reference))


def _differences(seen: Sequence[Any], reference: Sequence[Any]) -> tuple[int, int]:
    """How many items `seen` has too many, and how many it lacks."""
    if seen == reference:
        return 0, 0
    if seen == reference[: len(seen)]:
        return 0, len(reference) - len(seen)
    more = fewer = 0
    matcher = difflib.SequenceMatcher(None, reference, seen, autojunk=False)
    for tag, start, end, seen_start, seen_end in matcher.get_opcodes():
        if tag != "equal":
            fewer += end - start
            more += seen_end - seen_start
    return more, fewer


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 1) of `values` do not exceed; NaN of nothing."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]
