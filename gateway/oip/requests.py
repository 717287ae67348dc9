"""A ModelInferRequest as a request of OpenAI's API, with what the answer is to hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.errors import BadRequest
from gateway.oip.sampling import BOOL, one, parameters_of, parsed_json, sampling, typed
from gateway.oip.tensors import inputs_of
from gateway.proto import oip_pb2 as oip

TEXT_INPUTS = ("text_input", "prompt", "PROMPT")
MESSAGES = "messages"
# Triton's vLLM backend has these, as tensors of one BOOL.
RETURNED = {
    "return_finish_reason": "finish_reason",
    "return_num_input_tokens": "num_input_tokens",
    "return_num_output_tokens": "num_output_tokens",
}
OUTPUTS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
_FLAGS = ("stream", "exclude_input_in_output", *RETURNED)
_NO_SAMPLING = (*TEXT_INPUTS, MESSAGES, *_FLAGS)
_EMPTY_FINAL = "triton_enable_empty_final_response"


@dataclass(slots=True)
class Wanted:
    """One request, understood. `texts` are those the model is to continue; none with messages."""

    path: str
    payload: dict[str, Any]
    texts: list[str]
    id: str
    outputs: tuple[str, ...]
    stream: bool
    prepends_input: bool
    raw: bool
    final_response: bool
    timeout_s: float | None

    @property
    def num_outputs(self) -> int:
        """Texts that the answer has."""
        n = self.payload.get("n") or 1
        return max(len(self.texts), 1) * (n if isinstance(n, int) else 1)


def understood(request: oip.ModelInferRequest) -> Wanted:
    """What `request` wants.

    Raises:
        BadRequest: it makes no sense; the message names the tensor or parameter.
    """
    if request.model_version not in {"", "1"}:
        raise BadRequest(f"models have version '1' only, not {request.model_version[:50]!r}")
    tensors = inputs_of(request)
    given = parameters_of(request)
    flags = {name: _flag(name, tensors, given) for name in _FLAGS}
    stream = bool(flags["stream"])
    path, body, texts = _prompted(tensors)
    payload = {
        "model": request.model_name,
        **body,
        **sampling(given, tensors, _NO_SAMPLING),
        "stream": stream,
    }
    exclude = flags["exclude_input_in_output"]
    if exclude is False and (stream or not texts):
        raise BadRequest(
            "exclude_input_in_output can be false only without a stream and with a text",
            param="exclude_input_in_output",
        )
    outputs = _outputs(request, {RETURNED[name] for name in RETURNED if flags[name]})
    wanted = Wanted(
        path=path,
        payload=payload,
        texts=texts,
        id=request.id,
        outputs=outputs,
        stream=stream,
        prepends_input=bool(texts) and not (stream if exclude is None else exclude),
        raw=bool(request.raw_input_contents),
        final_response=given.get(_EMPTY_FINAL) is True,
        timeout_s=_timeout_s(given),
    )
    _ask_for_counts(wanted)
    return wanted


def _prompted(tensors: Mapping[str, list[Any]]) -> tuple[str, dict[str, Any], list[str]]:
    """Path, the part of the body that the model reads, and the texts."""
    names = [name for name in (*TEXT_INPUTS, MESSAGES) if name in tensors]
    if len(names) != 1:
        has = f"has {' and '.join(names)}" if names else "has neither"
        raise BadRequest(
            f"give one BYTES input, text_input (or prompt) or messages; the request {has}",
            param="text_input",
        )
    values = tensors[names[0]]
    if not values or not all(isinstance(value, str) for value in values):
        raise BadRequest(f"the input {names[0]!r} must be BYTES, not empty", param=names[0])
    if names[0] == MESSAGES:
        messages = parsed_json(MESSAGES, one(MESSAGES, values))
        if not isinstance(messages, list):
            raise BadRequest("messages must be a JSON list of OpenAI's messages", param=MESSAGES)
        return "/v1/chat/completions", {MESSAGES: messages}, []
    prompt = values[0] if len(values) == 1 else values
    return "/v1/completions", {"prompt": prompt}, values


def _outputs(request: oip.ModelInferRequest, returned: set[str]) -> tuple[str, ...]:
    """The names of the outputs, in OUTPUTS' order."""
    asked = [output.name for output in request.outputs]
    for output in request.outputs:
        if output.name not in OUTPUTS:
            known = ", ".join(OUTPUTS)
            raise BadRequest(f"there is no output {output.name[:100]!r}; known: {known}")
        if "shared_memory_region" in output.parameters or "classification" in output.parameters:
            raise BadRequest(
                f"the output {output.name!r} can have neither shared memory nor classification"
            )
    return tuple(
        n for n in OUTPUTS if n in asked or n in returned or (not asked and n == "text_output")
    )


def _ask_for_counts(wanted: Wanted) -> None:
    """A stream's token counts come only if asked for, with every chunk where the engine can."""
    if not {"num_input_tokens", "num_output_tokens"} & set(wanted.outputs):
        return
    if wanted.num_outputs > 1:
        raise BadRequest("tokens are counted for one text: send one, with n 1")
    if wanted.stream:
        options = {"include_usage": True, "continuous_usage_stats": True}
        wanted.payload["stream_options"] = options


def _flag(name: str, tensors: Mapping[str, list[Any]], given: Mapping[str, Any]) -> bool | None:
    if name in tensors:
        value = one(name, tensors[name])
    elif name in given:
        value = given[name]
    else:
        return None
    return bool(typed(name, value, BOOL))


def _timeout_s(given: Mapping[str, Any]) -> float | None:
    """Triton's `timeout` is in microseconds; 0: none."""
    value = given.get("timeout")
    return value / 1e6 if isinstance(value, int) and value > 0 else None
