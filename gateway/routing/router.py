"""Router: model name -> endpoint, by filter, scorer and picker. No I/O and no clock.

A choice reserves: `Router.reserve` returns a `Lease`, which counts in the endpoint's `in_flight` and
`work` until `Router.release`. Time and the random seed are arguments, so that a simulation decides
as a gateway does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from random import Random

from gateway.call import Call
from gateway.endpoints import Endpoint, EndpointTable, ServedModel
from gateway.record import Record
from gateway.routing.breaker import Breaker, BreakerRules, Fault
from gateway.routing.choice import choose, take
from gateway.routing.filters import untried
from gateway.routing.learning import learn, proves_health
from gateway.routing.pickers import Picker, picker
from gateway.routing.prefill import place_to_read, spare_reading
from gateway.routing.request import Request
from gateway.routing.route import Route
from gateway.routing.siblings import count_apart, count_beside, count_together
from gateway.routing.state import Discovery, EndpointSnapshot, EndpointState, Lease, snapshot

_PUSHED_BACK_S = 1.0
_REVIEW_S = 1.0
_DOUBTED_S = 3.5  # the next failed check is told by then


def _nobody(_state: EndpointState, _now: float) -> None:
    """Nobody listens."""


class Router:
    """The newest endpoint table, with what is in flight at each endpoint.

    `workers` gateways share an endpoint's `max_in_flight` evenly, rounded up. `on_change` hears of
    every endpoint whose breaker or health changed.
    """

    def __init__(
        self, *, workers: int = 1, rules: BreakerRules | None = None, seed: int = 0
    ) -> None:
        self.on_change: Callable[[EndpointState, float], None] = _nobody
        self._workers = workers
        self._rules = rules or BreakerRules()
        self._random = Random(seed)  # noqa: S311 - the spread of load is no secret
        self._routes: dict[str, Route] = {}
        self._pickers: dict[str, Picker] = {}
        self._aliases: dict[str, str] = {}
        self._states: dict[tuple[str, str], EndpointState] = {}
        self._by_url: dict[str, list[EndpointState]] = {}

    # The table

    def apply(self, table: EndpointTable) -> None:
        """Route by `table` from now on. Leases stay valid, endpoints that stay keep their counts."""
        models = {model.name: model for model in table.models}
        listed: dict[str, list[Endpoint]] = {name: [] for name in models}
        for endpoint in table.endpoints:
            name = endpoint.model
            if name not in listed:
                models[name], listed[name] = ServedModel(name=name, scalable=False), []
            listed[name].append(endpoint)
        old_routes, old_states = self._routes, self._states
        count_apart(old_states.values())
        self._routes, self._states = {}, {}
        for name, model in models.items():
            route = self._routes[name] = old_routes.get(name) or Route(model)
            if name in old_routes and route.serves(model, listed[name]):
                self._states |= {(name, key): state for key, state in route.by_key.items()}
                continue  # most models are as they were
            route.model = model
            route.settle(self._states_of(route, listed[name], old_states))
            self._pickers[name] = picker(model.routing.policy, self._random)
        for identity, state in old_states.items():
            if state.in_flight and identity not in self._states:
                self._states[identity] = state  # should it return, its streams still count
        count_together(self._routes.values())
        self._aliases = {alias: name for name, m in models.items() for alias in m.aliases}
        self._by_url = {}
        for route in self._routes.values():
            for state in route.states:
                self._by_url.setdefault(state.endpoint.url, []).append(state)

    def _states_of(
        self,
        route: Route,
        endpoints: Sequence[Endpoint],
        old: dict[tuple[str, str], EndpointState],
    ) -> list[EndpointState]:
        states: list[EndpointState] = []
        staying, used = set(route.states), route.used_bits()
        for endpoint in endpoints:
            identity = (endpoint.model, endpoint.key)
            if identity in self._states:
                continue  # twice in the table: the first counts
            state = old.get(identity)
            if state is None:
                state = EndpointState(endpoint, 1, Breaker(self._rules))
            elif state.endpoint.url != endpoint.url:
                state.forget_failures(self._rules)
                route.index.forget(state.bit)
            state.endpoint = endpoint
            state.max_in_flight = -(-endpoint.max_in_flight // self._workers)
            if state not in staying:
                state.bit = ~used & (used + 1)  # the lowest that is free
                used |= state.bit
            self._states[identity] = state
            states.append(state)
        return states

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

    def fallbacks(self, model: str) -> tuple[str, ...]:
        """Models that may answer instead of `model`, in order: those of its own list, no further."""
        served = self.resolve(model)
        if served is None:
            return ()
        found = [self.resolve(name) for name in served.fallback]
        names = dict.fromkeys(other.name for other in found if other is not None)
        names.pop(served.name, None)
        return tuple(names)

    def can_serve(self, model: str, tried: Collection[str] = ()) -> bool:
        """Whether a ready endpoint exists, busy or not, that has not failed this request."""
        route = self._routes.get(model)
        return route is not None and bool(untried(route, tried))

    def num_ready(self, model: str) -> int:
        """Endpoints of `model` that take requests."""
        route = self._routes.get(model)
        return sum(state.takes_requests for state in route.ready) if route else 0

    def places(self, model: str) -> tuple[int, int]:
        """Free places at endpoints of `model` that take requests, and all of theirs."""
        route = self._routes.get(model)
        ready = route.ready if route else ()
        free = sum(max(0, state.max_in_flight - state.in_flight) for state in ready)
        return free, sum(state.max_in_flight for state in ready)

    def context(self, model: str) -> int | None:
        """The shortest context of the model's endpoints, tokens; None: unknown."""
        route = self._routes.get(model)
        contexts = [state.max_model_len for state in route.states] if route else []
        return min((each for each in contexts if each), default=None)

    def snapshot(self, now: float) -> list[EndpointSnapshot]:
        """Every endpoint of the table as it is now."""
        return [
            snapshot(state, now, len(route.index))
            for route in self._routes.values()
            for state in route.states
        ]

    # Requests

    def reserve(
        self,
        model: str,
        *,
        now: float,
        tried: Collection[str] = (),
        call: Call | None = None,
    ) -> Lease | None:
        """A place at the best endpoint, or None when there is no place for this request."""
        route = self._routes.get(model)
        if route is None:
            return None
        if call is not None and call.endpoint_key is not None:
            return _at_holder(route, call.endpoint_key, now)
        ready = route.ready
        if route.is_clear and len(ready) == 1 and not tried:
            state = ready[0]  # nothing to decide, so that nothing need be known
            if state.in_flight >= state.max_in_flight:
                return None
            return take(route, state, Request(route.usual_work, route.usual_work), now)
        pick = self._pickers[model]
        return choose(route, pick, call=call, tried=tried, now=now, random=self._random)

    def release(self, lease: Lease, *, now: float = 0.0, record: Record | None = None) -> bool:
        """Give the place back. Returns False, and changes nothing, if it was given back before.

        What `record` says of the answer is learned from: its time, its tokens, and that the
        endpoint is well.
        """
        if lease.released:
            return False
        lease.released = True
        state = lease.state
        state.in_flight -= 1
        state.work -= lease.work
        if state.siblings:
            count_beside(state, -1, -lease.work)
        if lease.is_probe:
            state.breaker.probing = False
        if record is not None and not lease.failed:
            self._learn(lease, record, now)
        return True

    def _learn(self, lease: Lease, record: Record, now: float) -> None:
        state = lease.state
        if proves_health(record):
            state.failed_checks = 0
            # A slow endpoint is no failed one: of it only a probe tells.
            decides = lease.is_probe or not state.breaker.is_slow
            if decides and state.breaker.succeeded():
                self.on_change(state, now)
        route = self._routes.get(state.endpoint.model)
        if route is None:
            return
        if len(route.states) == 1:
            return  # there is nobody to compare it with
        learn(route, lease, record, workers=self._workers, now=now)
        if now >= route.reviewed_at + _REVIEW_S and len(route.states) > 1:
            route.reviewed_at = now
            route.review_speeds(now)
            for slow in route.eject_outliers(now):
                route.is_clear = False
                self.on_change(slow, now)

    def reserve_to_read(
        self, writer: Lease, call: Call, *, least_tokens: int, now: float
    ) -> Lease | None:
        """A place where only the prompt of `call` is read, if that pays. Give it back as any other."""
        route = self._routes.get(writer.endpoint.model)
        if route is None:
            return None
        return place_to_read(route, writer, call, least_tokens=least_tokens, now=now)

    def prompt_read(self, reader: Lease, writer: Lease, *, now: float) -> None:
        """The engine at `reader` has read the prompt that `writer` answers. Before `release`."""
        state = reader.state
        state.failed_checks = 0
        decides = reader.is_probe or not state.breaker.is_slow
        if decides and state.breaker.succeeded():
            self.on_change(state, now)
        spare_reading(writer, now)

    def failed(self, lease: Lease, fault: Fault, *, now: float) -> float:
        """The endpoint failed `lease`'s request. Returns the seconds for which it is distrusted."""
        state, rules = lease.state, self._rules
        route = self._routes.get(state.endpoint.model)
        lease.failed = True
        if route is not None:
            route.is_clear = False
        if fault is Fault.BUSY:
            state.busy_until = now + _PUSHED_BACK_S
            return 0.0
        if fault is Fault.BROKE:
            state.suspect_until = now + rules.open_s
        if state.breaker.failed(fault, now):
            if fault is Fault.UNREACHABLE and route is not None:
                route.index.forget(state.bit)  # what comes up there has an empty cache
            self.on_change(state, now)
        return max(state.trusted_again() - now, 0.0)

    # Active checks

    def urls(self) -> dict[str, Endpoint]:
        """Where endpoints listen, each with one endpoint that does."""
        return {url: states[0].endpoint for url, states in self._by_url.items()}

    def check_passed(
        self, url: str, *, now: float, discovery: Discovery | None = None
    ) -> list[EndpointState]:
        """The engine at `url` is well. Returns those that take requests again because of it.

        That somebody listens does not tell whether requests succeed: a breaker that opened for
        another cause waits for one to try.
        """
        revived = []
        for state in self._by_url.get(url, ()):
            state.failed_checks = 0
            came_back = state.dead
            state.dead = False
            if state.breaker.cause is Fault.UNREACHABLE:
                came_back |= state.breaker.close()
            route = self._routes[state.endpoint.model]
            if discovery is not None:
                state.discovery = discovery
                route.note_kinds()
            if came_back:
                route.refresh()
                revived.append(state)
            if came_back or discovery is not None:
                self.on_change(state, now)
        return revived

    def _doubt(self, state: EndpointState, now: float) -> None:
        """Send elsewhere for a while, if another endpoint answers its checks.

        Where none does, it is rather the gateway or the load that is slow.
        """
        route = self._routes[state.endpoint.model]
        if any(not other.failed_checks and other.is_trusted(now) for other in route.ready):
            state.suspect_until = max(state.suspect_until, now + _DOUBTED_S)
            route.is_clear = False

    def check_failed(self, url: str, *, now: float, enough: int) -> list[EndpointState]:
        """The engine at `url` did not answer. Returns those whose requests should be given up.

        An endpoint is dead after `enough` of these without a success between, of a check or of a
        request.
        """
        hopeless = []
        for state in self._by_url.get(url, ()):
            state.failed_checks += 1
            if state.failed_checks < enough:
                self._doubt(state, now)
                continue
            if not state.dead:
                state.dead = True
                route = self._routes[state.endpoint.model]
                route.index.forget(state.bit)
                route.refresh()
                self.on_change(state, now)
            elif not state.in_flight:
                continue
            hopeless.append(state)
        return hopeless


def _at_holder(route: Route, key: str, now: float) -> Lease | None:
    """A place at the endpoint `key`, also while it drains: only it can answer."""
    for state in route.states:
        if state.endpoint.key == key and state.in_flight < state.max_in_flight:
            return take(route, state, Request(route.usual_work, route.usual_work), now)
    return None
