"""OpenAI's answers and chunks as the protocol's responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.errors import EngineBroke
from gateway.oip.requests import OUTPUTS, Wanted
from gateway.oip.tensors import add_output, set_text
from gateway.proto import oip_pb2 as oip

VERSION = "1"
_FINAL = "triton_final_response"


class Answers:
    """Makes the responses to one request."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._count = wanted.num_outputs
        self._only_text = wanted.outputs == ("text_output",)
        self._message: oip.ModelStreamInferResponse | None = None  # the last chunk's, used again
        self._num_told = 0  # output tokens that former chunks have told

    def whole(self, body: Mapping[str, Any]) -> oip.ModelInferResponse:
        """The response to a request without a stream.

        Raises:
            EngineBroke: the engine's answer has another form than OpenAI's.
        """
        choices = _choices(body)
        texts, reasons = self._spread(choices)
        wanted = self._wanted
        if wanted.prepends_input:
            per_text = self._count // len(wanted.texts)
            texts = [wanted.texts[number // per_text] + text for number, text in enumerate(texts)]
        return self._response(texts, reasons, self._counts(body))

    def chunk(self, chunk: Mapping[str, Any]) -> oip.ModelStreamInferResponse | None:
        """The message that says what a stream's chunk says; None if that is nothing.

        Raises:
            EngineBroke: as `whole`.
        """
        texts, reasons = self._spread(_choices(chunk))
        counts = (0, 0) if self._only_text else self._counts(chunk)
        if not any(texts) and not any(reasons) and not counts[1]:
            return None
        if not self._only_text or self._count > 1:
            return in_stream(self._response(texts, reasons, counts))
        if self._message is None:
            self._message = in_stream(self._response(texts, reasons, counts))
        else:  # all that differs from the last one
            set_text(self._message.infer_response, texts[0])
        return self._message

    def final(self) -> oip.ModelStreamInferResponse | None:
        """The message without outputs that says that no more will come, for those who asked."""
        if not self._wanted.final_response:
            return None
        return in_stream(self._begun(is_final=True))

    def _spread(self, choices: list[Any]) -> tuple[list[str], list[str | None]]:
        """Texts and finish reasons by index."""
        texts = [""] * self._count
        reasons: list[str | None] = [None] * self._count
        for choice in choices:
            try:
                index = choice.get("index", 0)
                said = choice.get("delta") or choice.get("message") or choice
                texts[index] += said.get("content" if said is not choice else "text") or ""
                reasons[index] = choice.get("finish_reason")
            except (AttributeError, IndexError, TypeError):
                raise EngineBroke("the engine's answer has an unknown form") from None
        return texts, reasons

    def _counts(self, body: Mapping[str, Any]) -> tuple[int, int]:
        """Tokens in, and tokens out since the last chunk."""
        usage = body.get("usage")
        if not isinstance(usage, dict):
            return 0, 0
        total = usage.get("completion_tokens") or 0
        new, self._num_told = max(total - self._num_told, 0), max(total, self._num_told)
        return usage.get("prompt_tokens") or 0, new

    def _response(
        self, texts: list[str], reasons: list[str | None], counts: tuple[int, int]
    ) -> oip.ModelInferResponse:
        response = self._begun(is_final=False)
        values: dict[str, list[Any]] = {
            "text_output": texts,
            "finish_reason": [str(reason) for reason in reasons],  # "None", as Triton says it
            "num_input_tokens": [counts[0]],
            "num_output_tokens": [counts[1]],
        }
        for name in self._wanted.outputs:
            add_output(response, name, OUTPUTS[name], values[name], raw=self._wanted.raw)
        return response

    def _begun(self, *, is_final: bool) -> oip.ModelInferResponse:
        wanted = self._wanted
        response = oip.ModelInferResponse(
            model_name=wanted.payload["model"], model_version=VERSION, id=wanted.id
        )
        if wanted.final_response:
            response.parameters[_FINAL].bool_param = is_final
        return response


def in_stream(response: oip.ModelInferResponse) -> oip.ModelStreamInferResponse:
    """A response as a stream has it."""
    return oip.ModelStreamInferResponse(infer_response=response)


def failure(request_id: str, message: str) -> oip.ModelStreamInferResponse:
    """What a stream says of the request `request_id` that went wrong."""
    return oip.ModelStreamInferResponse(
        error_message=message, infer_response=oip.ModelInferResponse(id=request_id)
    )


def _choices(body: Mapping[str, Any]) -> list[Any]:
    choices = body.get("choices")
    if not isinstance(choices, list):
        raise EngineBroke("the engine's answer has no choices")
    return choices
