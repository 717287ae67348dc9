"""Sampling parameters in the three places where Triton's clients put them, in the types engines want."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec

from gateway.errors import BadRequest
from gateway.proto import oip_pb2 as oip
from placement.errors import nearest

BOOL, _WHOLE, _NUMBER, _TEXT, _LIST, _JSON = "BOOL", "INT32", "FP32", "BYTES", "LIST", "JSON"
BUNDLE = "sampling_parameters"  # JSON of any of them
# What engines take beside the text; vLLM's names where OpenAI has none.
SAMPLING = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "presence_penalty"), _NUMBER),
    **dict.fromkeys(("frequency_penalty", "repetition_penalty", "length_penalty"), _NUMBER),
    **dict.fromkeys(("max_tokens", "min_tokens", "top_k", "seed", "n", "best_of"), _WHOLE),
    **dict.fromkeys(("truncate_prompt_tokens", "max_completion_tokens"), _WHOLE),
    **dict.fromkeys(("ignore_eos", "skip_special_tokens", "use_beam_search"), BOOL),
    **dict.fromkeys(("include_stop_str_in_output", "spaces_between_special_tokens"), BOOL),
    **dict.fromkeys(("add_special_tokens", "add_generation_prompt"), BOOL),
    **dict.fromkeys(("user", "chat_template", "guided_regex", "guided_grammar"), _TEXT),
    **dict.fromkeys(("stop", "stop_token_ids", "guided_choice"), _LIST),
    **dict.fromkeys(("logit_bias", "response_format", "guided_json"), _JSON),
    **dict.fromkeys(("structured_outputs", "chat_template_kwargs"), _JSON),
}
# What clients put among the parameters that is no engine's matter.
_IGNORED = frozenset(("priority", "timeout", "binary_data_output", "content_type"))
_BOOLS = {"true": True, "1": True, "false": False, "0": False}


def sampling(
    given: Mapping[str, Any], tensors: Mapping[str, list[Any]], others: Collection[str]
) -> dict[str, Any]:
    """From `given`, the request's parameters, then `sampling_parameters`, then tensors: the last one counts.

    `others` are the names that stand there for something else.

    Raises:
        BadRequest: a name is unknown, or a value has another type.
    """
    result = _of_parameters(given, others)
    if BUNDLE in tensors:
        values = parsed_json(BUNDLE, one(BUNDLE, tensors[BUNDLE]))
        if not isinstance(values, dict):
            raise BadRequest(f"{BUNDLE} must be a JSON object", param=BUNDLE)
        for name, value in values.items():
            if name not in SAMPLING:
                raise _unknown("sampling parameter", name, others)
            result[name] = typed(name, value)
    for name, values in tensors.items():
        if name in SAMPLING:
            whole = SAMPLING[name] == _LIST and len(values) != 1
            result[name] = values if whole else typed(name, one(name, values))
        elif name != BUNDLE and name not in others:
            raise _unknown("input", name, others)
    return result


def parameters_of(request: oip.ModelInferRequest) -> dict[str, Any]:
    """The request's parameters as plain values."""
    kinds = ((n, v, v.WhichOneof("parameter_choice")) for n, v in request.parameters.items())
    return {name: getattr(value, kind) if kind else None for name, value, kind in kinds}


def _of_parameters(given: Mapping[str, Any], others: Collection[str]) -> dict[str, Any]:
    result = {}
    for name, value in given.items():
        if name in SAMPLING:
            result[name] = typed(name, value)
        elif name in {"sequence_id", "sequence_start", "sequence_end"}:
            raise BadRequest("sequences are not supported: send each request whole", param=name)
        elif not (name in _IGNORED or name in others or name.startswith("triton_")):
            raise _unknown("parameter", name, others)
    return result


def typed(name: str, value: Any, kind: str = "") -> Any:
    """`value` in the type that engines want. Triton's clients write numbers as strings, too.

    Raises:
        BadRequest: it cannot be had.
    """
    kind = kind or SAMPLING[name]
    try:
        return _CONVERTED[kind](value)
    except (ValueError, KeyError, TypeError):
        raise BadRequest(f"{name} cannot be {str(value)[:100]!r}", param=name) from None


def _whole(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _listed(value: Any) -> Any:
    """A list, or one text; a text may be a list in JSON."""
    if isinstance(value, str) and value.startswith("["):
        try:
            parsed = msgspec.json.decode(value)
        except msgspec.DecodeError:
            return value
        return parsed if isinstance(parsed, list) else value
    return value


def _parsed(value: Any) -> Any:
    return msgspec.json.decode(value) if isinstance(value, str) else value


_CONVERTED: dict[str, Callable[[Any], Any]] = {
    BOOL: lambda value: _BOOLS[str(value).lower()],
    _WHOLE: _whole,
    _NUMBER: _number,
    _TEXT: str,
    _LIST: _listed,
    _JSON: _parsed,
}


def one(name: str, values: list[Any]) -> Any:
    """The only element of a tensor.

    Raises:
        BadRequest: there are more, or none.
    """
    if len(values) != 1:
        raise BadRequest(f"{name} must have one element, not {len(values)}", param=name)
    return values[0]


def parsed_json(name: str, text: Any) -> Any:
    """What a JSON text says.

    Raises:
        BadRequest: it is none.
    """
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, TypeError, RecursionError) as error:
        raise BadRequest(f"{name} is not valid JSON: {error}", param=name) from None


def _unknown(what: str, name: str, others: Collection[str]) -> BadRequest:
    hint = nearest(name[:100], [BUNDLE, *others, *SAMPLING])
    return BadRequest(f"there is no {what} {name[:100]!r}{hint}", param=name[:100])
