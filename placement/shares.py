"""A model's bounds shared out over its variants: so that they add up, and roles grow together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from placement.fleet import ReplicaBounds
from placement.routing_policy import Role


@dataclass(frozen=True, slots=True)
class Share:
    """A variant of a model, as far as its bounds go."""

    role: Role
    replicas: int
    price_per_request: tuple[float, str]  # least first


def shared_bounds(wish: ReplicaBounds, variants: Sequence[Share]) -> list[ReplicaBounds]:
    """Bounds of each variant of one model; `wish` is the model's.

    At least `wish.min` replicas that answer, and of those that read prompts the same share. What
    may still be added goes to the variant that carries a request at least price, or, if prefill and
    decode replicas do, to both as they are now.
    """
    if len(variants) == 1:
        return [wish]
    spare = wish.max - sum(each.replicas for each in variants)
    least = _least(wish, variants)
    more = _more(spare, variants)
    return [
        ReplicaBounds(min=low, max=max(1, each.replicas + added))
        for each, low, added in zip(variants, least, more, strict=True)
    ]


def _order(variants: Sequence[Share]) -> list[int]:
    return sorted(range(len(variants)), key=lambda at: variants[at].price_per_request)


def _least(wish: ReplicaBounds, variants: Sequence[Share]) -> list[int]:
    left, found = wish.min, [0] * len(variants)
    for at in _order(variants):
        if variants[at].role != "prefill":
            found[at] = min(variants[at].replicas, left)
            left -= found[at]
    writing = sum(each.replicas for each in variants if each.role == "decode")
    kept = sum(low for low, each in zip(found, variants, strict=True) if each.role == "decode")
    for at, each in enumerate(variants):
        if each.role == "prefill" and writing:
            found[at] = math.ceil(each.replicas * kept / writing)
    return found


def _more(spare: int, variants: Sequence[Share]) -> list[int]:
    """Added to each; of several variants of a role the cheapest gets the role's share."""
    order, found = _order(variants), [0] * len(variants)
    cheapest: dict[Role, int] = {}
    for at in order:
        cheapest.setdefault(variants[at].role, at)
    if "whole" in cheapest and _price(variants, cheapest, "whole") <= _price(
        variants, cheapest, "prefill", "decode"
    ):
        found[cheapest["whole"]] = spare
        return found
    engines: dict[Role, int] = {"prefill": 0, "decode": 0}
    for each in variants:
        if each.role != "whole":
            engines[each.role] += each.replicas
    running = sum(engines.values())
    reading = spare * engines["prefill"] // running if running else spare // 2
    found[cheapest["prefill"]], found[cheapest["decode"]] = reading, spare - reading
    return found


def _price(variants: Sequence[Share], cheapest: Mapping[Role, int], *roles: Role) -> float:
    """Of a request/s that these roles carry together; without one of them, none."""
    return sum(
        variants[cheapest[role]].price_per_request[0] if role in cheapest else math.inf
        for role in roles
    )
