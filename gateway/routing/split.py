"""TrafficSplit: which variant gets the next request, when an operator gave them weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from zlib import crc32

from gateway.routing.hash_ring import spread
from gateway.routing.state import EndpointState


class TrafficSplit:
    """Smooth weighted round robin: at any time a variant is off its share by a request or two.

    Sessions stay with their variant; the other requests even that out.
    """

    __slots__ = ("_credits", "weights")

    def __init__(self) -> None:
        self.weights: Mapping[str, float] = {}
        self._credits: dict[str, float] = {}

    def weigh(self, weights: Mapping[str, float]) -> None:
        """Use these from now on."""
        if weights != self.weights:
            self.weights, self._credits = weights, {}

    def of(self, candidates: Sequence[EndpointState], session: str | None) -> list[EndpointState]:
        """Those of `candidates` that are of the variant whose turn it is.

        A variant without a candidate neither gets a request nor a claim to more of them later.
        """
        weights = self.weights
        able = dict.fromkeys(state.endpoint.variant for state in candidates)
        shares = {variant: weight for variant in able if (weight := weights.get(variant, 0.0)) > 0}
        if not shares:
            return list(candidates)
        chosen = _of_session(shares, session) if session else self._next(shares)
        total = sum(shares.values())
        credit = self._credits
        for variant, weight in shares.items():
            credit[variant] = credit.get(variant, 0.0) + weight / total
        credit[chosen] -= 1.0
        return [state for state in candidates if state.endpoint.variant == chosen]

    def _next(self, shares: Mapping[str, float]) -> str:
        total = sum(shares.values())
        return max(shares, key=lambda name: self._credits.get(name, 0.0) + shares[name] / total)


def _of_session(shares: Mapping[str, float], session: str) -> str:
    """Weighted rendezvous hashing: a change of weights moves as few sessions as it can."""
    key = session.encode()

    def score(variant: str) -> float:
        drawn = (spread(crc32(variant.encode(), crc32(key))) + 0.5) / 2**32
        return -shares[variant] / math.log(drawn)

    return max(shares, key=score)
