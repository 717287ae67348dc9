"""Learning: what a finished request tells of its endpoint and of its model's answers."""

from __future__ import annotations

from gateway.record import Record
from gateway.routing.route import Route
from gateway.routing.state import OUTPUT_TOKEN_WORK, Lease

_CLIENT_LEFT = 499
_SHORTEST_S = 1e-4


def proves_health(record: Record) -> bool:
    """Whether the endpoint answered well. An error of the client is no failure of the engine."""
    if record.status == _CLIENT_LEFT:
        return record.ttft_s is not None
    return record.status < 500 and record.status != 429


def learn(route: Route, lease: Lease, record: Record, *, workers: int, now: float) -> None:
    """Take the pace of a whole answer whose tokens were counted. `workers` gateways work alike."""
    usage = record.usage
    if usage is None or record.status != 200:
        return
    if usage.completion_tokens:
        route.learn_output(usage.completion_tokens)
    prompt_tokens = usage.prompt_tokens if lease.prompt_tokens is None else lease.prompt_tokens
    work = prompt_tokens + OUTPUT_TOKEN_WORK * usage.completion_tokens
    seconds = now - lease.since
    if work <= 0 or seconds < _SHORTEST_S:
        return
    state = lease.state
    crowd = workers * (lease.crowd + state.in_flight + 1) / 2
    state.pace.observe(seconds=seconds, work=work, crowd=crowd, now=now)
