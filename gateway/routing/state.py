"""EndpointState and Lease: what a gateway knows of an endpoint, and one request's place there.

Work is counted in whole units of a prompt token, so that sums come back to exactly 0. An output
token is eight of them: about what a decode step of a full batch costs beside prefill, per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from gateway.endpoints import Endpoint, EngineKind
from gateway.routing.breaker import Breaker, BreakerRules, BreakerState
from gateway.routing.pace import Pace
from gateway.tenants import ANONYMOUS, Tenant
from placement.routing_policy import Role

OUTPUT_TOKEN_WORK = 8


@dataclass(frozen=True, slots=True)
class Discovery:
    """What an engine said of itself."""

    engine: EngineKind | None = None
    max_model_len: int | None = None


@dataclass(slots=True, eq=False)
class EndpointState:
    """An endpoint and what this gateway knows of it. `speed` is work per second."""

    endpoint: Endpoint
    max_in_flight: int
    breaker: Breaker = field(default_factory=lambda: Breaker(BreakerRules()))
    bit: int = 1  # in the model's prefix index
    in_flight: int = 0
    work: int = 0  # of those in flight
    speed: float = 1.0
    last_turn: int = 0  # of its model, when it was chosen last
    requests: int = 0
    suspect_until: float = -math.inf
    busy_until: float = -math.inf  # it pushed back
    dead: bool = False  # by active checks
    failed_checks: int = 0
    discovery: Discovery = Discovery()
    pace: Pace = field(default_factory=Pace)
    ejections: int = 0
    # Other names of the same engine (a model and its adapters): each counts what all have there.
    siblings: tuple[EndpointState, ...] = field(default=(), repr=False)
    others_in_flight: int = 0  # of `in_flight`
    others_work: int = 0  # of `work`

    @property
    def load(self) -> float:
        """Share of its places that are taken."""
        return self.in_flight / self.max_in_flight

    @property
    def takes_requests(self) -> bool:
        """Ready, and alive as far as we know."""
        return self.endpoint.state == "ready" and not self.dead

    @property
    def max_model_len(self) -> int | None:
        """Its context in tokens, if the table or the engine tells."""
        return self.endpoint.max_model_len or self.discovery.max_model_len

    @property
    def engine(self) -> EngineKind | None:
        """What runs there, if the table or the engine tells."""
        return self.endpoint.engine or self.discovery.engine

    def is_trusted(self, now: float) -> bool:
        """It has not failed lately, or it is time to try it again."""
        return self.suspect_until <= now and self.breaker.admits(now)

    def is_clear(self, now: float) -> bool:
        """There is nothing against it at all."""
        return self.breaker.closed and self.suspect_until <= now and self.busy_until <= now

    def trusted_again(self) -> float:
        """When it is worth another try."""
        return max(self.suspect_until, self.breaker.open_until)

    def forget_failures(self, rules: BreakerRules) -> None:
        """It is another engine now."""
        self.suspect_until = self.busy_until = -math.inf
        self.breaker = Breaker(rules)
        self.dead, self.failed_checks = False, 0
        self.discovery = Discovery()
        self.pace = Pace()


class Rewrite(Protocol):
    """What an engine is asked in the place of the client's own request."""

    def request(self, served_model_name: str, *, by_ids: bool) -> tuple[str, bytes]:
        """Path and body for the engine that knows the model by that name.

        `by_ids`: it takes and gives token ids as vLLM does.
        """


class Lease(msgspec.Struct, eq=False):  # a dataclass takes three times as long to make
    """A place at an endpoint, held by one request."""

    state: EndpointState
    endpoint: Endpoint
    work: int = 0  # reserved there, and given back with the place
    since: float = 0.0
    crowd: int = 1  # requests there when it began, itself included
    prompt_tokens: int | None = None  # estimated, without what was cached; None: not looked at
    is_probe: bool = False  # a half-open breaker waits for its result
    failed: bool = False
    released: bool = False
    tenant: Tenant = ANONYMOUS
    rewrite: Rewrite | None = None  # for this place only; None: the client's own request


@dataclass(frozen=True, slots=True)
class EndpointSnapshot:
    """One endpoint at a moment, for people to look at."""

    model: str
    variant: str
    key: str
    url: str
    state: str  # ready, draining or dead
    role: Role
    engine: EngineKind | None
    max_model_len: int | None
    breaker: BreakerState
    ejected: bool  # its breaker is open because it is slow
    in_flight: int
    max_in_flight: int
    tokens_in_flight: int  # prompt tokens, and eight for each output token still expected
    tokens_per_s: float | None  # output tokens, as observed under its load
    relative_speed: float  # what routing believes; only comparable within a model
    requests: int
    ejections: int
    prefix_blocks: int  # of its model's index


def snapshot(state: EndpointState, now: float, prefix_blocks: int) -> EndpointSnapshot:
    """`state` as it is now."""
    endpoint, breaker = state.endpoint, state.breaker
    return EndpointSnapshot(
        model=endpoint.model,
        variant=endpoint.variant,
        key=endpoint.key,
        url=endpoint.url,
        state="dead" if state.dead else endpoint.state,
        role=endpoint.role,
        engine=state.engine,
        max_model_len=state.max_model_len,
        breaker=breaker.state(now),
        ejected=breaker.is_slow,
        in_flight=state.in_flight,
        max_in_flight=state.max_in_flight,
        tokens_in_flight=state.work,
        tokens_per_s=state.pace.output_tokens_per_s(OUTPUT_TOKEN_WORK),
        relative_speed=state.speed,
        requests=state.requests,
        ejections=state.ejections,
        prefix_blocks=prefix_blocks,
    )
