"""The simulated engine's HTTP bodies, in vLLM's form: requests, answers, stream chunks, errors."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.engines.sim_batch import Generation, Limits
from cluster.engines.sim_text import Continuation, StopStrings, count_tokens

COMPLETION_MAX_TOKENS = 16  # OpenAI's and vLLM's default of /v1/completions

# vLLM's default of chat is the rest of the context. Since the simulator reserves KV cache for
# max_tokens at admission, that would let only `max_concurrency` such requests run; an answer that
# reaches this limit by itself is rarer than one in a thousand.
CHAT_MAX_TOKENS = 1024


def error_body(message: str, status: int, *, kind: str = "", param: str = "") -> dict[str, Any]:
    """OpenAI's form of an error; without `kind` that of the HTTP status."""
    kind = kind or f"{HTTPStatus(status).phrase.title().replace(' ', '')}Error"
    return {"error": {"message": message, "type": kind, "param": param or None, "code": status}}


class RequestRefused(Exception):
    """The request cannot be served: HTTP `status` and an OpenAI error body."""

    def __init__(
        self, message: str, *, status: int = 400, kind: str = "BadRequestError", param: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, status, kind=kind, param=param)


class _Body(BaseModel):
    # As vLLM: what it does not know (temperature, top_p, user ...) does not change the simulation.
    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str | None = None


class StreamOptions(BaseModel):
    """`stream_options`."""

    include_usage: bool = False


class _Generate(_Body):
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    max_tokens: int | None = Field(None, ge=1)
    stop: str | tuple[str, ...] | None = None
    seed: int | None = None
    ignore_eos: bool = False


class ChatRequest(_Generate):
    """Body of POST /v1/chat/completions."""

    messages: tuple[Mapping[str, Any], ...] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    continue_final_message: bool = False


class CompletionRequest(_Generate):
    """Body of POST /v1/completions."""

    prompt: str | tuple[int, ...] | tuple[str, ...]


class TokenizeRequest(_Body):
    """Body of POST /tokenize: either `prompt` or `messages`."""

    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()


RequestT = TypeVar("RequestT", bound=_Body)


def parse(body: bytes, form: type[RequestT], *, served: str) -> RequestT:
    """Read a request for the model `served`.

    Raises:
        RequestRefused: not JSON, not of that form (400), or for another model (404).
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestRefused(f"There was an error parsing the body: {error}") from None
    try:
        request = form.model_validate(value)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise RequestRefused(f"{where or 'body'}: {problem['msg']}", param=where) from None
    if request.model not in (None, served):
        raise RequestRefused(
            f"The model `{request.model}` does not exist.",
            status=404,
            kind="NotFoundError",
            param="model",
        )
    return request


def generation_of(request: ChatRequest | CompletionRequest, limits: Limits) -> Generation:
    """What the engine has to do for `request`.

    Raises:
        RequestRefused: more than one choice, an empty prompt, or more tokens than the context.
    """
    if request.n != 1:
        raise RequestRefused("the simulated engine gives one choice: n must be 1", param="n")
    if request.stream_options and not request.stream:
        raise RequestRefused("Stream options can only be defined when `stream=True`.")
    prompt = prompt_of(request)
    prompt_tokens = count_tokens(prompt)
    max_tokens = _max_tokens(request, prompt_tokens, limits.max_model_len)
    stop = (request.stop,) if isinstance(request.stop, str) else request.stop or ()
    return Generation(
        prompt_tokens,
        max_tokens,
        Continuation(prompt, seed=request.seed, ignore_eos=request.ignore_eos),
        StopStrings(tuple(string for string in stop if string)),
    )


def prompt_of(request: ChatRequest | CompletionRequest | TokenizeRequest) -> str:
    """The text that the model continues."""
    if isinstance(request, CompletionRequest):
        prompt = request.prompt
        if isinstance(prompt, str):
            return prompt
        if len(prompt) > 1 and isinstance(prompt[0], str):
            raise RequestRefused("the simulated engine takes one prompt a request", param="prompt")
        return " ".join(str(part) for part in prompt)
    if isinstance(request, TokenizeRequest) and request.prompt is not None:
        return request.prompt
    # With `continue_final_message` the last answer stays open, so that a stream that broke off is
    # continued where it ended.
    turns = [f"{message.get('role')}:\n{_text_of(message)}" for message in request.messages]
    if isinstance(request, ChatRequest) and request.continue_final_message:
        return "\n".join(turns)
    return "\n".join([*turns, "assistant:\n"])


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    return " ".join(
        str(part.get("text", part.get("type", ""))) for part in parts if isinstance(part, Mapping)
    )


def _max_tokens(
    request: ChatRequest | CompletionRequest, prompt_tokens: int, max_model_len: int
) -> int:
    asked, default = request.max_tokens, COMPLETION_MAX_TOKENS
    if isinstance(request, ChatRequest):
        asked, default = request.max_completion_tokens or request.max_tokens, CHAT_MAX_TOKENS
    room = max_model_len - prompt_tokens
    limit = f"This model's maximum context length is {max_model_len} tokens."
    if prompt_tokens == 0:
        raise RequestRefused("The decoder prompt cannot be empty", param="prompt")
    if room < 1:
        raise RequestRefused(
            f"{limit} However, your prompt contains {prompt_tokens} input tokens, which exceeds "
            "this limit even without any output tokens. Please reduce the length of the input "
            "prompt.",
            param="input_tokens",
        )
    if asked is not None and asked > room:
        raise RequestRefused(
            f"{limit} However, you requested {asked} output tokens and your prompt contains "
            f"{prompt_tokens} input tokens, for a total of {prompt_tokens + asked} tokens. Please "
            "reduce the length of the input prompt or the number of requested output tokens.",
            param="input_tokens",
        )
    return asked or min(default, room)


def usage_of(generation: Generation) -> dict[str, int]:
    """`usage` of what has been generated so far."""
    return {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.completion_tokens,
        "total_tokens": generation.prompt_tokens + generation.completion_tokens,
    }


@dataclass(frozen=True, slots=True)
class Answer:
    """The bodies that answer one request."""

    chat: bool
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, finish_reason: str | None, usage: Mapping[str, int]) -> Any:
        """The body when the request does not stream."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": [self._choice(said, finish_reason)],
            "usage": usage,
        }

    def opening(self) -> bytes:
        """The first event of a stream; completions have none."""
        return self._event([self._choice({"delta": {"role": "assistant", "content": ""}}, None)])

    def chunk(self, text: str, finish_reason: str | None) -> bytes:
        """An event that adds `text`."""
        said = {"delta": {"content": text}} if self.chat else {"text": text}
        return self._event([self._choice(said, finish_reason)])

    def closing(self, usage: Mapping[str, int] | None) -> bytes:
        """The end of a stream: `usage`, if it was asked for, and the end mark."""
        return (self._event([], usage=usage) if usage else b"") + b"data: [DONE]\n\n"

    def _choice(self, said: Mapping[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        chunk = {**head, "choices": choices, **more}
        return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }
