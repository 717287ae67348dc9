"""`/console`: one page without a dependency, and the numbers that it draws.

The page looks every other second and keeps what it saw; the gateway only tells its totals. They are
read from its metrics, which sum all workers; only endpoints are this worker's.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gateway.admission import Admission
from gateway.metering import Meter

_PAGE = Path(__file__).with_name("console.html")
_REMEMBERED_S = 0.25  # so that many open pages cost no more than one that asks all the time


@dataclass(slots=True)
class _Totals:
    """What the metrics say of one model since the gateway's start."""

    statuses: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    values: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    histograms: dict[str, dict[float, float]] = field(
        default_factory=lambda: {"ttft": defaultdict(float), "itl": defaultdict(float)}
    )


_REQUESTS = "bora_gateway_requests_total"
# Series -> the name in our document.
_VALUES = {
    "bora_gateway_prompt_tokens_total": "prompt_tokens",
    "bora_gateway_completion_tokens_total": "completion_tokens",
    "bora_gateway_retries_total": "retries",
    "bora_gateway_migrations_total": "migrations",
    "bora_gateway_in_flight": "in_flight",
    "bora_gateway_queued": "queued",
}
_HISTOGRAMS = {
    "bora_gateway_time_to_first_token_seconds_bucket": "ttft",
    "bora_gateway_inter_token_latency_seconds_bucket": "itl",
}
_NAMES = (_REQUESTS, *_VALUES, *_HISTOGRAMS)


class Console:
    """Makes both documents. `workers` is how many processes share the gateway's ports."""

    def __init__(
        self,
        admission: Admission,
        meter: Meter,
        is_ready: Callable[[], bool],
        *,
        workers: int = 1,
    ) -> None:
        self._admission = admission
        self._is_ready = is_ready
        self._meter = meter
        self._workers = workers
        self._started = time.monotonic()
        self._made: tuple[float, bytes] = (-_REMEMBERED_S, b"")

    def page(self) -> tuple[bytes, bytes]:
        """Header lines and the page. It runs its own script and style, and nothing else."""
        return _page()

    def data(self) -> bytes:
        """The numbers, as JSON."""
        now = time.monotonic()
        if now - self._made[0] >= _REMEMBERED_S:
            self._made = now, json.dumps(self._document(now)).encode()
        return self._made[1]

    def _document(self, now: float) -> dict[str, Any]:
        table, router = self._admission.table, self._admission.router
        totals = _totals(self._meter)
        endpoints = endpoints_of(self._admission, now)
        numbers: dict[str, int] = defaultdict(int)
        for endpoint in endpoints:
            numbers[endpoint["model"]] += 1
        return {
            "ready": self._is_ready(),
            "uptime_s": round(now - self._started, 3),
            "workers": self._workers,
            "table_version": table.version if table else None,
            "models": [
                {
                    "name": model.name,
                    "aliases": list(model.aliases),
                    "ready": router.num_ready(model.name),
                    "total": numbers[model.name],
                    **_told(totals[model.name]),
                }
                for model in router.models
            ],
            "unrouted": dict(totals[""].statuses),
            "endpoints": endpoints,
        }


def endpoints_of(admission: Admission, now: float) -> list[dict[str, Any]]:
    """Every endpoint as this worker sees it. No credentials: URLs may hold some."""
    return [
        {
            "model": one.model,
            "variant": one.variant,
            "key": one.key if one.key != one.url else _without_user(one.url),
            "url": _without_user(one.url),
            "state": one.state,
            "breaker": one.breaker,
            "in_flight": one.in_flight,
            "max_in_flight": one.max_in_flight,
            "requests": one.requests,
        }
        for one in admission.router.snapshot(now)
    ]


def _without_user(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _told(totals: _Totals) -> dict[str, Any]:
    values = {name: int(totals.values[name]) for name in _VALUES.values()}
    histograms = {}
    for name, buckets in totals.histograms.items():
        bounds = sorted(buckets)  # the last is infinite
        histograms[name] = (
            {"bounds_s": bounds[:-1], "counts": [int(buckets[bound]) for bound in bounds]}
            if buckets
            else None
        )
    return {"statuses": dict(totals.statuses), **values, **histograms}


def _totals(meter: Meter) -> dict[str, _Totals]:
    """By model; under the empty name what was refused before it had one."""
    result: dict[str, _Totals] = defaultdict(_Totals)
    for metric in meter.totals(_NAMES):
        for sample in metric.samples:
            name, labels, value = sample.name, sample.labels, sample.value
            totals = result[labels.get("model", "")]
            if name == _REQUESTS:
                totals.statuses[labels["status"]] += int(value)
            elif name in _VALUES:
                totals.values[_VALUES[name]] += value
            elif name in _HISTOGRAMS:
                totals.histograms[_HISTOGRAMS[name]][float(labels["le"])] += value
    return result


@cache
def _page() -> tuple[bytes, bytes]:
    page = _PAGE.read_bytes()
    policy = (
        "default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none';"
        f" frame-ancestors 'none'; script-src {_hash(page, b'script')};"
        f" style-src {_hash(page, b'style')}"
    )
    headers = (
        "content-type: text/html; charset=utf-8\r\n"
        f"content-security-policy: {policy}\r\n"
        "x-content-type-options: nosniff\r\n"
        "referrer-policy: no-referrer\r\n"
        "cache-control: no-cache\r\n"
    )
    return headers.encode(), page


def _hash(page: bytes, tag: bytes) -> str:
    """The source expression that allows the page's only element of that name."""
    start = page.index(b"<%b>" % tag) + len(tag) + 2
    content = page[start : page.index(b"</%b>" % tag, start)]
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
