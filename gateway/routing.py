"""Routing: model name -> endpoint, chosen by filter, scorer and picker. No I/O and no clock.

A choice reserves: `Router.reserve` returns a `Lease`, which counts in the endpoint's `in_flight`
until `Router.release`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from gateway.call import Call
from gateway.endpoints import Endpoint, EndpointTable, ServedModel


@dataclass(slots=True, eq=False)
class EndpointState:
    """An endpoint and what this gateway knows of it."""

    endpoint: Endpoint
    max_in_flight: int
    in_flight: int = 0
    requests: int = 0
    suspect_until: float = -math.inf

    @property
    def load(self) -> float:
        """Share of its places that are taken."""
        return self.in_flight / self.max_in_flight


@dataclass(slots=True, eq=False)
class Lease:
    """A place at an endpoint, held by one request."""

    state: EndpointState
    endpoint: Endpoint
    released: bool = False


@dataclass(slots=True)
class Route:
    """A model and the endpoints that serve it."""

    model: ServedModel
    states: list[EndpointState] = field(default_factory=list)


def untried(states: Iterable[EndpointState], tried: Collection[str]) -> list[EndpointState]:
    """Filter: those that take requests and have not failed this one."""
    ready = [state for state in states if state.endpoint.state == "ready"]
    return [state for state in ready if state.endpoint.key not in tried] if tried else ready


def holder(states: Iterable[EndpointState], key: str) -> EndpointState | None:
    """The endpoint `key` if it has a free place, also while it drains: only it can answer."""
    for state in states:
        if state.endpoint.key == key and state.in_flight < state.max_in_flight:
            return state
    return None


def pick(
    states: Iterable[EndpointState], *, now: float, tried: Collection[str] = ()
) -> EndpointState | None:
    """The least loaded endpoint with a free place, or None.

    Suspects are considered only when nothing else is left: while a healthy endpoint is merely busy,
    waiting for it beats trying one that does not answer.
    """
    best: EndpointState | None = None
    only_suspects = True
    for state in untried(states, tried):
        is_suspect = state.suspect_until > now
        if only_suspects and not is_suspect:
            best, only_suspects = None, False
        if is_suspect is not only_suspects or state.in_flight >= state.max_in_flight:
            continue
        if best is None or (state.load, state.requests) < (best.load, best.requests):
            best = state
    return best


class Router:
    """The newest endpoint table, with what is in flight at each endpoint.

    `workers` gateways share an endpoint's `max_in_flight` evenly, rounded up.
    """

    def __init__(self, *, workers: int = 1) -> None:
        self._workers = workers
        self._routes: dict[str, Route] = {}
        self._aliases: dict[str, str] = {}
        self._states: dict[tuple[str, str], EndpointState] = {}

    def apply(self, table: EndpointTable) -> None:
        """Route by `table` from now on. Leases stay valid, endpoints that stay keep their counts."""
        routes = {model.name: Route(model) for model in table.models}
        old, self._states = self._states, {}
        for endpoint in table.endpoints:
            route = routes.setdefault(
                endpoint.model, Route(ServedModel(name=endpoint.model, scalable=False))
            )
            identity = (endpoint.model, endpoint.key)
            if identity in self._states:
                continue  # twice in the table: the first counts
            state = self._updated(old.get(identity), endpoint)
            self._states[identity] = state
            route.states.append(state)
        for identity, state in old.items():
            if state.in_flight and identity not in self._states:
                self._states[identity] = state  # should it return, its streams still count
        self._routes = routes
        self._aliases = {
            alias: route.model.name for route in routes.values() for alias in route.model.aliases
        }

    def _updated(self, state: EndpointState | None, endpoint: Endpoint) -> EndpointState:
        places = -(-endpoint.max_in_flight // self._workers)
        if state is None:
            return EndpointState(endpoint, places)
        if state.endpoint.url != endpoint.url:
            state.suspect_until = -math.inf
        state.endpoint, state.max_in_flight = endpoint, places
        return state

    @property
    def models(self) -> list[ServedModel]:
        """Every model of the table, in its order."""
        return [route.model for route in self._routes.values()]

    @property
    def names(self) -> list[str]:
        """Everything that a client may call a model."""
        return [*self._routes, *self._aliases]

    def resolve(self, name: str) -> ServedModel | None:
        """The model of that name or alias. A name wins over another model's alias."""
        route = self._routes.get(name) or self._routes.get(self._aliases.get(name, ""))
        return route.model if route else None

    def can_serve(self, model: str, tried: Collection[str] = ()) -> bool:
        """Whether a ready endpoint exists, busy or not, that has not failed this request."""
        route = self._routes.get(model)
        return route is not None and bool(untried(route.states, tried))

    def num_ready(self, model: str) -> int:
        """Endpoints of `model` that take requests."""
        route = self._routes.get(model)
        return len(untried(route.states, ())) if route else 0

    def reserve(
        self,
        model: str,
        *,
        now: float,
        tried: Collection[str] = (),
        call: Call | None = None,
    ) -> Lease | None:
        """A place at the best endpoint, or None when there is no place."""
        route = self._routes.get(model)
        if route is None:
            state = None
        elif call is not None and call.endpoint_key is not None:
            state = holder(route.states, call.endpoint_key)
        else:
            state = pick(route.states, now=now, tried=tried)
        if state is None:
            return None
        state.in_flight += 1
        state.requests += 1
        return Lease(state, state.endpoint)

    def release(self, lease: Lease) -> bool:
        """Give the place back. Returns False, and changes nothing, if it was given back before."""
        if lease.released:
            return False
        lease.released = True
        lease.state.in_flight -= 1
        return True

    def suspect(self, lease: Lease, *, until: float) -> None:
        """The endpoint failed: it is the last choice until then."""
        lease.state.suspect_until = max(lease.state.suspect_until, until)
