"""The simulated engine's answers and stream events: key for key and byte for byte as vLLM's."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.engines.sim_batch import Delta, Generation

_FINGERPRINT = "bora-sim"


def usage_of(generation: Generation, completion_tokens: int) -> dict[str, int]:
    """`usage` of an answer of so many tokens."""
    return {
        "prompt_tokens": generation.prompt_tokens,
        "total_tokens": generation.prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


@dataclass(frozen=True, slots=True)
class Answer:
    """The bodies that answer one request.

    `prompt_token_ids`: those of the prompt if the client wants token ids, else None. Then a chat
    stream has them beside the choices of its first event, and completions have them in the choice
    of the first event; every other event has the `token_ids` of its text.
    """

    chat: bool
    model: str
    request_id: str
    prompt_token_ids: Sequence[int] | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(
        self,
        deltas: Sequence[Delta],
        usage: Mapping[str, int],
        kv_transfer_params: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The body when the request does not stream."""
        text = "".join(delta.text for delta in deltas)
        said: dict[str, Any] = {"text": text}
        if self.chat:
            said = {"message": {**_MESSAGE, "content": text}}
        choice = {
            "index": 0,
            **said,
            "logprobs": None,
            "finish_reason": deltas[-1].finish_reason,
            "stop_reason": deltas[-1].stop_reason,
            "token_ids": self._ids([delta.token_id for delta in deltas]),
        }
        if not self.chat:
            choice |= {"prompt_logprobs": None, "prompt_token_ids": self.prompt_token_ids}
        body = {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": [choice],
            "service_tier": None,
            "system_fingerprint": _FINGERPRINT,
            "usage": usage,
        }
        if self.chat:
            body |= {"prompt_logprobs": None, "prompt_token_ids": self.prompt_token_ids}
        return {**body, "kv_transfer_params": kv_transfer_params}

    def opening(self, usage: Mapping[str, int] | None) -> bytes:
        """The first event of a stream; completions have none."""
        if not self.chat:
            return b""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        more = {} if usage is None else {"usage": usage}
        ids = {"prompt_token_ids": self.prompt_token_ids, "prompt_text": None}
        return self._event([choice], {**more, **ids})

    def chunk(
        self, delta: Delta, *, is_first: bool, with_usage: bool, usage: Mapping[str, int] | None
    ) -> bytes:
        """An event that adds one token. `usage`: of the answer so far, if every event tells it."""
        choice: dict[str, Any] = {"index": 0}
        if self.chat:
            choice |= {"delta": {"content": delta.text}, "logprobs": None}
        else:
            choice |= {"text": delta.text, "logprobs": None}
        choice["finish_reason"] = delta.finish_reason
        if delta.finish_reason or not self.chat:
            choice["stop_reason"] = delta.stop_reason
        if not self.chat:
            choice["prompt_token_ids"] = self.prompt_token_ids if is_first else None
        choice["token_ids"] = self._ids([delta.token_id])
        more: dict[str, Any] = {} if usage is None else {"usage": usage}
        if delta.finish_reason and not with_usage:  # else the event with the usage tells it
            more["system_fingerprint"] = _FINGERPRINT
        return self._event([choice], more)

    def closing(self, usage: Mapping[str, int] | None) -> bytes:
        """The end of a stream: `usage`, if it was asked for, and the end mark."""
        more = {"usage": usage, "system_fingerprint": _FINGERPRINT}
        return (self._event([], more) if usage else b"") + b"data: [DONE]\n\n"

    def _ids(self, token_ids: list[int]) -> list[int] | None:
        return None if self.prompt_token_ids is None else token_ids

    def _event(self, choices: list[dict[str, Any]], more: Mapping[str, Any]) -> bytes:
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        chunk = {**head, "choices": choices, **more}
        data = json.dumps(chunk, separators=(",", ":"), ensure_ascii=False)
        return b"data: " + data.encode("utf-8", "replace") + b"\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }


_MESSAGE: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "refusal": None,
    "annotations": None,
    "audio": None,
    "function_call": None,
    "reasoning": None,
}
