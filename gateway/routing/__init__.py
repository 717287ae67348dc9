"""Routing: which endpoint gets a request. Filter, scorer, picker; and what they know.

features        what a request's raw bytes tell: tokens, prefix hashes, session
state, route    what is known of an endpoint, and of a model
filters         who can and may get it: context, capabilities, breaker, free place
request         features, work and who has the prompt cached
scorers         predicted seconds at each, and who is overloaded
pickers, split  policies; weights of variants
choice          all of these in their order
prefill         where a prompt is read whose answer another endpoint writes
breaker, pace   what failures and finished requests teach
router          the table, reservations, active checks: what the gateway talks to
"""

from gateway.routing.breaker import Breaker, BreakerRules, Fault, fault_of
from gateway.routing.router import Router
from gateway.routing.state import Discovery, EndpointSnapshot, EndpointState, Lease, Rewrite

__all__ = (
    "Breaker",
    "BreakerRules",
    "Discovery",
    "EndpointSnapshot",
    "EndpointState",
    "Fault",
    "Lease",
    "Rewrite",
    "Router",
    "fault_of",
)
