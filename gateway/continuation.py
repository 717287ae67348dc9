"""Continuation: how another engine goes on with a stream that its engine left unfinished. Pure.

Exact: the ids of the prompt and of the tokens so far are the prompt of a completion, whose chunks are
put into the form of the stream. Else by text: chat goes on with its last message
(`continue_final_message`), a completion with its prompt and the text so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gateway.lenient_json import json_bytes, quoted, read_json
from gateway.sse import event_data
from gateway.transcript import Again, Transcript

CHAT_PATH = "/v1/chat/completions"
COMPLETION_PATH = "/v1/completions"
_MAX_TOKENS = ("max_tokens", "max_completion_tokens")
# What both APIs take, with the same meaning.
_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "logit_bias"),
    *("stop_token_ids", "ignore_eos", "min_tokens", "bad_words", "allowed_token_ids", "priority"),
    *("skip_special_tokens", "spaces_between_special_tokens", "user", "cache_salt", "vllm_xargs"),
    *("stream_options", "stop", "include_stop_str_in_output"),
)
# What depends on the output so far in a way that a prompt does not carry.
_STATEFUL = (
    *("grammar", "json_schema", "n_probs", "mirostat", "structural_tag", "structured_outputs"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("logprobs", "top_logprobs", "echo", "suffix", "prompt_logprobs", "use_beam_search"),
    *("presence_penalty", "frequency_penalty", "thinking_token_budget"),
)


_FINAL_NAMES = ("system_fingerprint", "service_tier")  # of a stream's last chunks


class CannotContinue(Exception):
    """A continuation would not be what the first engine would have said; the message says why."""


def can_be_continued(path: str) -> bool:
    """Whether streams of `path` can move at all."""
    return path in {CHAT_PATH, COMPLETION_PATH}


def continuation(
    path: str, request: Mapping[str, Any], told: Transcript, *, by_ids: bool
) -> tuple[str, dict[str, Any]]:
    """What to ask for, where, after `told`, which was rolled back. `by_ids`: the next engine takes and gives token ids as vLLM.

    Raises:
        CannotContinue: it would not be faithful.
    """
    if by_ids and goes_by_ids(request, told):
        if told.num_tokens:
            return _by_ids(request, told)
        # Nothing is said yet: asked anew, its engine's parser of reasoning has its part.
        return path, {**request, "return_token_ids": True}
    if told.reasoned:
        raise CannotContinue("it has reasoned, and the tokens of that are not known")
    return _by_text(path, request, told)


def goes_by_ids(request: Mapping[str, Any], told: Transcript) -> bool:
    """Whether token ids carry all that matters.

    They do not carry images, and not the parser of tool calls. Text that was held back for a stop
    string is made again: only a greedy engine makes the same.
    """
    if not told.is_exact or request.get("tools") or _has_media(request):
        return False
    return not num_held(request) or request.get("temperature") == 0


def num_held(request: Mapping[str, Any]) -> int:
    """Characters that vLLM holds back, as they may begin one of the request's stop strings."""
    stop = request.get("stop") or ()
    if request.get("include_stop_str_in_output"):
        return 0
    strings = (stop,) if isinstance(stop, str) else stop
    return max((len(one) - 1 for one in strings if isinstance(one, str)), default=0)


def check(request: Mapping[str, Any], told: Transcript) -> None:
    """Raise `CannotContinue` for what no engine could go on with."""
    if told.blocked:
        raise CannotContinue(told.blocked)
    for name in _STATEFUL:
        if request.get(name):
            raise CannotContinue(f"`{name}` depends on what its engine knew")
    prompt = request.get("prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    if several or (request.get("n") or 1) != 1 or (request.get("best_of") or 1) != 1:
        raise CannotContinue("it has several choices")
    for name in (*_MAX_TOKENS, "min_tokens"):
        limit = request.get(name)
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
            raise CannotContinue(f"`{name}` is no whole number, so that what is left is not known")
    format_ = request.get("response_format")
    if isinstance(format_, dict) and format_.get("type", "text") != "text":
        raise CannotContinue("its engine kept the state of the answer's grammar")
    if request.get("tools") and request.get("tool_choice", "auto") not in {"auto", "none"}:
        raise CannotContinue("its engine kept the state of the tool call's grammar")


def _by_ids(request: Mapping[str, Any], told: Transcript) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {name: request[name] for name in _SAMPLING if name in request}
    body["prompt"] = told.prompt_token_ids() + told.token_ids
    body["stream"] = body["return_token_ids"] = True
    limit = _max_tokens(request)
    body["max_tokens"] = None if limit is None else limit - told.num_tokens
    _lessen(body, "min_tokens", told.num_tokens)
    return COMPLETION_PATH, body


def _by_text(path: str, request: Mapping[str, Any], told: Transcript) -> tuple[str, dict[str, Any]]:
    body = dict(request)
    for name in _MAX_TOKENS:
        _lessen(body, name, told.num_tokens)
    _lessen(body, "min_tokens", told.num_tokens)
    if path == COMPLETION_PATH:
        if not isinstance(request.get("prompt"), str):
            raise CannotContinue("its prompt is no single text")
        body["prompt"] += told.text
        limit = _max_tokens(request)
        if limit is not None:
            body["max_tokens"] = limit - told.num_tokens
        return path, body
    messages = list(request.get("messages") or ())
    if request.get("continue_final_message"):
        last = messages[-1] if messages and isinstance(messages[-1], dict) else {}
        if not isinstance(last.get("content"), str):
            raise CannotContinue("its final message is no single text")
        messages[-1] = {**last, "content": last["content"] + told.text}
    elif told.text:
        messages.append({"role": "assistant", "content": told.text})
        body.update(continue_final_message=True, add_generation_prompt=False)
    body["messages"] = messages
    return path, body


def _max_tokens(request: Mapping[str, Any]) -> int | None:
    """How long the answer may be. OpenAI's default for completions is 16; chat has none."""
    for name in reversed(_MAX_TOKENS):
        limit = request.get(name)
        if isinstance(limit, int):
            return limit
    return 16 if "messages" not in request and "max_tokens" not in request else None


def _lessen(body: dict[str, Any], name: str, by: int) -> None:
    if body.get(name):
        body[name] = max(0, body[name] - by)


def _has_media(request: Mapping[str, Any]) -> bool:
    """Whether a message has parts that token ids do not carry: images, sound."""
    contents = [m.get("content") for m in request.get("messages") or () if isinstance(m, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(not isinstance(part, dict) or part.get("type") != "text" for part in parts)


class Splice:
    """Puts the chunks of a continuation into the stream: same ids, form and counts as before.

    What is made `again` was sent before, and is not sent a second time.
    """

    def __init__(self, told: Transcript, request: Mapping[str, Any], path: str) -> None:
        self.again = Again()
        self._told = told
        self._is_chat = path == CHAT_PATH
        self._carried = told.num_tokens
        self._max_tokens = _max_tokens(request)
        options = request.get("stream_options")
        self._wants_usage = bool(isinstance(options, dict) and options.get("include_usage"))
        self._prompt_tokens = told.num_prompt_tokens or None

    @property
    def is_exhausted(self) -> bool:
        """The client has as many tokens as it asked for."""
        return self._max_tokens is not None and self._told.num_tokens >= self._max_tokens

    def feed(self, events: bytes) -> bytes:
        """The next events of the continuation, as the client should have them."""
        told = self._told
        parts: list[bytes] = []
        for data in event_data(events, with_done=True):
            if data == b"[DONE]":
                told.finished = told.done = True
                parts.append(b"data: [DONE]\n\n")
                continue
            try:
                chunk = read_json(data)
            except ValueError as error:
                told.fault = f"it sent an event that is no JSON: {error}"
                break
            if not isinstance(chunk, dict) or "error" in chunk:
                told.fault = f"it sent an error: {str(chunk)[:200]}"
                break
            event = self._chunk(chunk)
            if told.fault:
                break
            parts.append(event)
        return b"".join(parts)

    def ending(self) -> bytes:
        """What is missing of a stream whose text is complete."""
        told, parts = self._told, []
        if not told.finished:
            parts.append(self._event([self._choice("", "length", None, [])]))
        if self._wants_usage and not told.usage_sent and self._prompt_tokens is not None:
            usage = {"prompt_tokens": self._prompt_tokens, "completion_tokens": told.num_tokens}
            usage["total_tokens"] = sum(usage.values())
            parts.append(self._event([], usage))
        if not told.done:
            parts.append(b"data: [DONE]\n\n")
        return b"".join(parts)

    def _chunk(self, chunk: dict[str, Any]) -> bytes:
        told = self._told
        choices = []
        for choice, delta in _choices(chunk):
            reason = choice.get("finish_reason")
            if reason == "abort":
                told.fault = "it gave the request up"
                return b""
            text = choice.get("text") or delta.get("content") or ""
            ids = choice.get("token_ids") or []
            if not isinstance(text, str) or not isinstance(ids, list):
                told.fault = "it sent a choice that is none"
                return b""
            is_again, num_out = self.again.num_tokens > 0, len(text)
            text = self._without_again(text, len(ids))
            if ids or num_out or not (delta.get("role") or reason):
                told.add(",".join(map(str, ids)).encode(), quoted(text), num_out)
            told.finished = told.finished or reason is not None
            if told.note_parts(delta, text):
                more = {"token_ids": None} if told.hides_ids and "token_ids" in choice else {}
                choices.append({**choice, "delta": _without_role(delta), **more})
            elif is_again and not text and not reason:
                continue
            elif text or ids or reason:
                choices.append(self._choice(text, reason, choice.get("stop_reason"), ids))
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            usage = self._usage(usage)
        if not choices and (chunk.get("choices") or usage is None):
            return b""
        told.usage_sent = told.usage_sent or not choices
        more = {name: chunk[name] for name in _FINAL_NAMES if name in chunk}
        return self._event(choices, usage, **more)

    def _without_again(self, text: str, num_tokens: int) -> str:
        """`text` without what the client has read; a fault if it should have read something else."""
        again = self.again
        length = min(len(text), len(again.text))
        if text[:length] != again.text[:length]:
            self._told.fault = self._told.blocked = "the next engine does not repeat what was said"
        self.again = Again(max(0, again.num_tokens - num_tokens), again.text[length:])
        return text[length:]

    def _choice(
        self, text: str, reason: str | None, stop_reason: Any, ids: list[int]
    ) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": {"content": text}} if self._is_chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        if reason or not self._is_chat:
            choice["stop_reason"] = stop_reason
        if not self._is_chat:
            choice["prompt_token_ids"] = None
        choice["token_ids"] = None if self._told.hides_ids else ids or None
        return choice

    def _usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Counts as if the tokens that were carried over had been made here."""
        total = usage.get("total_tokens") or 0
        prompt = self._prompt_tokens
        if prompt is None:
            prompt = max(0, (usage.get("prompt_tokens") or 0) - self._carried)
        completion = (usage.get("completion_tokens") or 0) + self._carried
        total = prompt + completion if total else total
        return {
            **usage,
            "prompt_tokens": prompt,
            "total_tokens": total,
            "completion_tokens": completion,
        }

    def _event(
        self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None, **more: Any
    ) -> bytes:
        chunk = {**(self._told.head or {}), "choices": choices, **more}
        if usage is not None:
            chunk["usage"] = usage
        return b"data: " + json_bytes(chunk) + b"\n\n"


def _choices(chunk: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each choice that is one, and its delta."""
    choices = chunk.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        delta = choice.get("delta") or {} if isinstance(choice, dict) else None
        if isinstance(delta, dict):
            yield choice, delta


def _without_role(delta: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in delta.items() if name != "role"}
