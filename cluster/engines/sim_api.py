"""What clients ask the simulated engine, in vLLM's form, and how it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.engines.sim_batch import Generation, Limits
from cluster.engines.sim_text import Continuation, StopStrings
from cluster.engines.sim_vocabulary import NoSuchToken, encode

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
    continuous_usage_stats: bool = False


class _Generate(_Body):
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0)
    stop: str | tuple[str, ...] | None = None
    seed: int | None = None
    ignore_eos: bool = False
    return_token_ids: bool | None = None
    kv_transfer_params: Mapping[str, Any] | None = None


class _Conversation(_Body):
    messages: tuple[Mapping[str, Any], ...] = Field(min_length=1)
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class ChatRequest(_Conversation, _Generate):
    """Body of POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(None, ge=1)


class CompletionRequest(_Generate):
    """Body of POST /v1/completions. The prompt is text, or ids of tokens."""

    prompt: str | tuple[int, ...] | tuple[tuple[int, ...], ...] | tuple[str, ...]


class TokenizeRequest(_Conversation):
    """Body of POST /tokenize: either `prompt` or `messages`."""

    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    return_token_strs: bool | None = None


class DetokenizeRequest(_Body):
    """Body of POST /detokenize."""

    tokens: tuple[int, ...]


RequestT = TypeVar("RequestT", bound=_Body)


def parse(body: bytes, form: type[RequestT]) -> RequestT:
    """Read a request.

    Raises:
        RequestRefused: not JSON, or not of that form.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestRefused(f"There was an error parsing the body: {error}") from None
    try:
        return form.model_validate(value)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise RequestRefused(f"{where or 'body'}: {problem['msg']}", param=where) from None


def generation_of(
    request: ChatRequest | CompletionRequest, limits: Limits, adapter: str = ""
) -> Generation:
    """What the engine has to do for `request`, whose answer depends on `adapter`.

    Raises:
        RequestRefused: more than one choice, an empty prompt, or more tokens than the context.
    """
    if request.n != 1:
        raise RequestRefused("the simulated engine gives one choice: n must be 1", param="n")
    if request.stream_options and not request.stream:
        raise RequestRefused("Stream options can only be defined when `stream=True`.")
    prompt = prompt_of(request)
    max_tokens = _max_tokens(request, len(prompt), limits.max_model_len)
    if request.min_tokens > max_tokens:
        raise RequestRefused(
            f"min_tokens must be less than or equal to max_tokens={max_tokens}, "
            f"got {request.min_tokens}."
        )
    stop = (request.stop,) if isinstance(request.stop, str) else request.stop or ()
    try:
        continuation = Continuation(
            prompt, seed=request.seed, ignore_eos=request.ignore_eos, adapter=adapter
        )
    except NoSuchToken as error:
        raise RequestRefused(str(error), param="prompt") from None
    return Generation(
        len(prompt),
        max_tokens,
        continuation,
        StopStrings(tuple(string for string in stop if string)),
        min_tokens=request.min_tokens,
    )


def prompt_of(request: ChatRequest | CompletionRequest | TokenizeRequest) -> Sequence[int]:
    """Ids of the tokens that the model continues.

    Raises:
        RequestRefused: more than one prompt, or a conversation that is to be continued in two ways.
    """
    if isinstance(request, CompletionRequest):
        prompt = request.prompt
        if isinstance(prompt, str):
            return encode(prompt)
        if prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise RequestRefused(
                    "the simulated engine takes one prompt a request", param="prompt"
                )
            prompt = prompt[0]
            return encode(prompt) if isinstance(prompt, str) else prompt
        return prompt  # type: ignore[return-value] # ids, as the first is one
    if isinstance(request, TokenizeRequest) and request.prompt is not None:
        return encode(request.prompt)
    return encode(_conversation(request))


def _conversation(request: ChatRequest | TokenizeRequest) -> str:
    # With `continue_final_message` the last answer stays open, so that a stream that broke off is
    # continued where it ended.
    turns = [f"{message.get('role')}:\n{_text_of(message)}" for message in request.messages]
    if request.continue_final_message and request.add_generation_prompt:
        raise RequestRefused(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True."
        )
    if request.add_generation_prompt:
        turns.append("assistant:\n")
    return "\n".join(turns)


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
