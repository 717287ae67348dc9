"""Request: what routing knows of a call beside the model's route: its work, and who has it cached."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from gateway.call import Call
from gateway.routing.features import BLOCK_ENDS, Features, features_of
from gateway.routing.route import Route

_WITHOUT_FEATURES = frozenset(("least_load", "round_robin", "random"))


class Request(msgspec.Struct, eq=False):
    """Of one call. `usual` is the work of the model's usual request.

    `holders` has a mask of endpoints for each leading block of the prompt that somebody has seen,
    `saved` the prompt tokens up to the end of that block.
    """

    work: int
    usual: int
    features: Features | None = None
    holders: Sequence[int] = ()
    saved: Sequence[int] = ()

    def saved_at(self, bit: int) -> int:
        """Prompt tokens that the endpoint `bit` has cached."""
        holders = self.holders
        for level in range(len(holders) - 1, -1, -1):
            if holders[level] & bit:
                return self.saved[level]
        return 0


def request_of(route: Route, call: Call | None, features: Features | None) -> Request:
    """`call` for `route`; its `features` are looked at here if they are needed and not given."""
    if call is None or route.policy in _WITHOUT_FEATURES:
        return Request(route.usual_work, route.usual_work)
    if features is None:
        features = features_of(call)
    work = route.work_of(call, features)
    if not features.hashes:
        return Request(work, route.usual_work, features)
    holders = route.index.holders(features.hashes)
    if not holders:
        return Request(work, route.usual_work, features)
    tokens, num_bytes = features.prompt_tokens, features.num_bytes
    saved = [tokens * end // num_bytes for end in BLOCK_ENDS[: len(holders)]]
    return Request(work, route.usual_work, features, holders, saved)
