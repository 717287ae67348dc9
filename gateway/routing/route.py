"""Route: a model, the endpoints that serve it, and what was learned of its requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gateway.call import Call
from gateway.endpoints import Endpoint, ServedModel
from gateway.routing.breaker import Fault
from gateway.routing.features import Features
from gateway.routing.hash_ring import HashRing
from gateway.routing.pace import outliers, speeds
from gateway.routing.prefix_index import PrefixIndex
from gateway.routing.split import TrafficSplit
from gateway.routing.state import OUTPUT_TOKEN_WORK, EndpointState
from placement.routing_policy import PolicyName

_FIRST_GUESS_TOKENS = 128.0  # of an answer, before any was seen
_LEARNING_RATE = 0.05
_OUTLIER_FACTOR = 5.0
_EJECTED_S = 10.0


@dataclass(slots=True, eq=False)
class Route:
    """`ready` are the states that take requests; `is_clear`: nothing is held against any of them.

    `prefills` only read prompts, and are among `ready` when nobody else is.
    """

    model: ServedModel
    states: list[EndpointState] = field(default_factory=list)
    ready: list[EndpointState] = field(default_factory=list)
    prefills: list[EndpointState] = field(default_factory=list)
    policy: PolicyName = "auto"
    index: PrefixIndex = field(default_factory=PrefixIndex)
    split: TrafficSplit = field(default_factory=TrafficSplit)
    is_clear: bool = True
    is_mixed: bool = False  # endpoints differ in context or capabilities
    turn: int = 0
    mean_output_tokens: float = _FIRST_GUESS_TOKENS
    usual_work: int = int(_FIRST_GUESS_TOKENS) * (OUTPUT_TOKEN_WORK + 1)
    reviewed_at: float = 0.0
    by_bit: dict[int, EndpointState] = field(default_factory=dict)
    by_key: dict[str, EndpointState] = field(default_factory=dict)
    all_bits: int = 0
    _ring: HashRing = field(default_factory=HashRing)
    _ring_is_old: bool = False

    def serves(self, model: ServedModel, endpoints: Sequence[Endpoint]) -> bool:
        """Whether it was settled with just these."""
        return self.model == model and [state.endpoint for state in self.states] == endpoints

    def settle(self, states: list[EndpointState]) -> None:
        """Serve the model with these states from now on."""
        gone = {state.bit for state in self.states} - {state.bit for state in states}
        if gone:
            self.index.forget(sum(gone))
        self.states = states
        self.by_key = {state.endpoint.key: state for state in states}
        self.by_bit = {state.bit: state for state in states}
        self.all_bits = sum(state.bit for state in answering(states))
        self._ring_is_old = True
        self.is_clear = False  # to be found out
        self.split.weigh(self.model.routing.weights)
        self.policy = self.model.routing.policy
        self.note_kinds()
        self.review_speeds(self.reviewed_at)
        self.refresh()

    def note_kinds(self) -> None:
        """More was learned of what the endpoints can do."""
        kinds = {(state.max_model_len, self.capabilities(state)) for state in self.states}
        self.is_mixed = len(kinds) > 1

    def refresh(self) -> None:
        """An endpoint died or came back."""
        able = [state for state in self.states if state.takes_requests]
        self.prefills = [state for state in able if state.endpoint.role == "prefill"]
        self.ready = answering(able)
        replaced = self.model.managed or self.model.scalable
        if not self.ready and not replaced:
            # Nobody brings another: an error at once tells more than a long wait for nothing.
            self.ready = [state for state in self.states if state.endpoint.state == "ready"]

    def capabilities(self, state: EndpointState) -> tuple[str, ...]:
        """What is known of them; empty: nothing."""
        return state.endpoint.capabilities or self.model.capabilities

    def used_bits(self) -> int:
        """Those of all states."""
        return sum(state.bit for state in self.states)

    def ring(self) -> HashRing:
        """Of all that answer requests by planned speed, so that gateways with one table agree."""
        if self._ring_is_old:
            weights = dict(zip(self.by_key, self._planned(), strict=True))
            names = [state.endpoint.key for state in answering(self.states)]
            self._ring.weigh({name: weights[name] for name in names})
            self._ring_is_old = False
        return self._ring

    def home(self, key: int) -> EndpointState | None:
        """The endpoint that a prompt or a session belongs to when nothing is known of it."""
        ring = self.ring() if self._ring_is_old else self._ring
        name = ring.home(key)
        return None if name is None else self.by_key[name]

    def homes(self, key: int) -> Iterable[EndpointState]:
        """Its home, then where it goes when that is overloaded."""
        return map(self.by_key.__getitem__, self.ring().walk(key))

    def work_of(self, call: Call, features: Features) -> int:
        """What a request costs an engine that has seen nothing of it."""
        output_tokens = self.mean_output_tokens if call.path != "/v1/embeddings" else 0
        if call.max_tokens is not None and call.max_tokens < output_tokens:
            output_tokens = call.max_tokens
        work = features.prompt_tokens + OUTPUT_TOKEN_WORK * int(output_tokens)
        self.usual_work += (work - self.usual_work) >> 5
        return work

    def learn_output(self, tokens: int) -> None:
        """An answer had so many tokens."""
        self.mean_output_tokens += _LEARNING_RATE * (tokens - self.mean_output_tokens)

    def review_speeds(self, now: float) -> None:
        """Correct the planned speeds by what was observed."""
        believed = speeds(self._planned(), [state.pace for state in self.states], now)
        for state, speed in zip(self.states, believed, strict=True):
            state.speed = speed

    def eject_outliers(self, now: float) -> list[EndpointState]:
        """Leave out for a while who is far slower than its peers. At most half of a variant."""
        ejected = []
        for variant in dict.fromkeys(state.endpoint.variant for state in self.ready):
            peers = [state for state in self.ready if state.endpoint.variant == variant]
            out = sum(state.breaker.is_slow for state in peers)
            slow = outliers([state.pace for state in peers], _OUTLIER_FACTOR)
            for state in [peers[i] for i in slow if peers[i].breaker.closed][
                : max(len(peers) // 2 - out, 0)
            ]:
                state.breaker.trip(now, Fault.SLOW, open_s=_EJECTED_S)
                state.pace.forget()
                state.ejections += 1
                ejected.append(state)
        return ejected

    def _planned(self) -> list[float]:
        """Work per second of each state; by `max_in_flight` where the table does not tell."""
        told = [state.endpoint.tokens_per_s for state in self.states]
        known = [(t, s.endpoint.max_in_flight) for t, s in zip(told, self.states, strict=True) if t]
        per_place = sum(t for t, _ in known) / sum(n for _, n in known) if known else 1.0
        return [
            OUTPUT_TOKEN_WORK * (tokens or state.endpoint.max_in_flight * per_place)
            for tokens, state in zip(told, self.states, strict=True)
        ]


def answering(states: Sequence[EndpointState]) -> list[EndpointState]:
    """Those that get whole requests: who only reads prompts does so when there is nobody else."""
    return [state for state in states if state.endpoint.role != "prefill"] or list(states)
