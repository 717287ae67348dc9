"""What an engine is asked for a call: the client's request, or how it goes on with a stream."""

from __future__ import annotations

from gateway import llamacpp_dialect
from gateway.call import Call, parse_object
from gateway.continuation import CHAT_PATH, CannotContinue, can_be_continued, num_held
from gateway.engine import request_head
from gateway.errors import BadRequest, EngineBroke
from gateway.routing import Lease
from gateway.transcript import Transcript

_ASK_FOR_IDS = b',"return_token_ids":true}'
# Events of all streams together (some 100 bytes each) that wait unread; of one stream.
_UNREAD, _LEAST_UNREAD, _MOST_UNREAD = 100_000, 16, 1024
_LONGEST_WITH_IDS_BYTES = 512 * 1024  # else the ids of the prompt would delay the first token


def engine_request(call: Call, lease: Lease) -> tuple[bytes, bytes]:
    """Head and body of what the engine at `lease` is asked.

    Raises:
        BadRequest: the client's body cannot be read, which its new name of the model would need.
        EngineBroke: that engine cannot go on with the stream.
    """
    endpoint, rewrite = lease.endpoint, lease.rewrite
    if rewrite is not None:
        name = endpoint.served_model_name or endpoint.model
        try:
            path, body = rewrite.request(name, by_ids=_tells_token_ids(lease))
        except CannotContinue as reason:
            raise EngineBroke(f"its engine broke off, and it cannot go on: {reason}") from None
    else:
        path, body = call.path, call.body_at(endpoint)
        if lease.state.engine == "llamacpp":
            path, body = llamacpp_dialect.asked(path, body)
        elif _hides_ids(call, lease):
            body = body.rstrip()[:-1] + _ASK_FOR_IDS
    head = request_head(endpoint, call, path, len(body))
    return head, body


def transcript_of(call: Call, lease: Lease, num_running: int) -> Transcript | None:
    """Where what the engine at `lease` says is noted, if streams of this kind can go on elsewhere.

    The fewer are `num_running`, the more it may keep unread.
    """
    if not can_be_continued(call.path):
        return None
    try:
        # llama.cpp holds back only what is the beginning of a stop string.
        holds = b'"stop"' in call.body and lease.state.engine != "llamacpp"
        held = num_held(parse_object(call.body)) if holds else 0
    except BadRequest:
        return None  # the engine can read it, but we cannot
    return Transcript(
        is_chat=call.path == CHAT_PATH,
        hides_ids=_hides_ids(call, lease),
        num_held=held,
        max_unread=min(max(_LEAST_UNREAD, _UNREAD // max(1, num_running)), _MOST_UNREAD),
    )


def _hides_ids(call: Call, lease: Lease) -> bool:
    """Whether the engine is asked for token ids that the client does not want to see."""
    return (
        call.is_stream
        and _tells_token_ids(lease)
        and can_be_continued(call.path)
        and len(call.body) <= _LONGEST_WITH_IDS_BYTES
        and not call.wants_ids
    )


def _tells_token_ids(lease: Lease) -> bool:
    """Whether the engine there tells token ids when asked, and takes them as a prompt."""
    return lease.state.engine in {"vllm", "sim"}
