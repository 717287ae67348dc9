"""Prefill: where a prompt is read whose answer another endpoint writes, and whether that pays."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.call import Call
from gateway.routing.choice import take
from gateway.routing.features import BLOCK_ENDS, Features, features_of
from gateway.routing.request import Request
from gateway.routing.route import Route
from gateway.routing.scorers import HELD_UP, cheapest_with_cache
from gateway.routing.siblings import count_beside
from gateway.routing.state import OUTPUT_TOKEN_WORK, Lease


def place_to_read(
    route: Route, writer: Lease, call: Call, *, least_tokens: int, now: float
) -> Lease | None:
    """A place at a prefill endpoint for the prompt of `call`, which `writer` answers.

    None: there is none, or it does not pay. It pays from `least_tokens` on that the writer has not
    cached, and as long as what is to be read there before takes no more than what reading the
    prompt at the writer would hold up there (the last term of `scorers`' cost).
    """
    ready = [
        state
        for state in route.prefills
        if state.in_flight < state.max_in_flight
        and state.is_trusted(now)
        and state.busy_until <= now
    ]
    if not ready:
        return None
    features = features_of(call)
    holders = route.index.holders(features.hashes)
    saved = _saved(features, len(holders))
    request = Request(
        features.prompt_tokens + OUTPUT_TOKEN_WORK, route.usual_work, features, holders, saved
    )
    tokens = writer.prompt_tokens
    if tokens is None:  # nothing was looked at when the writer was chosen
        tokens = features.prompt_tokens - request.saved_at(writer.state.bit)
        route.index.add(features.hashes, writer.state.bit)
    if tokens < least_tokens:
        return None
    best = cheapest_with_cache(ready, request, now)
    if best.work * route.usual_work > HELD_UP * tokens * writer.state.work:
        return None
    return take(route, best, request, now)


def spare_reading(writer: Lease, now: float) -> None:
    """The prompt was read elsewhere until now: that is neither work nor time of the writer's."""
    read = min(writer.prompt_tokens or 0, writer.work)
    writer.prompt_tokens, writer.since = 0, now
    writer.work -= read
    writer.state.work -= read
    if writer.state.siblings:
        count_beside(writer.state, 0, -read)


def _saved(features: Features, num_blocks: int) -> Sequence[int]:
    """Prompt tokens up to the end of each of the first blocks."""
    tokens, num_bytes = features.prompt_tokens, features.num_bytes
    return [tokens * end // num_bytes for end in BLOCK_ENDS[:num_blocks]]
