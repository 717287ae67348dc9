"""Roles: what replicas that read prompts, and replicas that write answers, carry together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from placement.plan import Variant
from placement.routing_policy import Role

ROLES: tuple[Role, ...] = get_args(Role)


def together(rates: Iterable[tuple[Role, float]]) -> float:
    """Requests/s of one model's replicas.

    Those of whole ones, and as many as there are prompts read as well as answers written: what one
    side can do beyond the other is of no use.
    """
    total = dict.fromkeys(ROLES, 0.0)
    for role, rate in rates:
        total[role] += rate
    return total["whole"] + min(total["prefill"], total["decode"])


def requests_per_s_of(variants: Iterable[Variant]) -> float:
    """That the variants of one model carry."""
    return together((each.role, each.replicas * each.capacity_requests_per_s) for each in variants)
