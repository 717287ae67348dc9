"""vLLM plugin: a bound for its store of responses, which by itself only grows.

With VLLM_ENABLE_RESPONSES_API_STORE vLLM keeps every response and the conversation before it, so that
clients can ask for it by id and go on from it, and never lets go of one. Here the oldest go first.

The plugin (`cluster.engines.cpu_plugin`) applies it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping
from types import ModuleType
from typing import Any

SERVING_MODULE = "vllm.entrypoints.openai.responses.serving"
MAX_RESPONSES = 1024
_RUNNING = frozenset(("queued", "in_progress"))  # in the background; vLLM will look for them


class BoundedStore(dict[str, Any]):
    """Responses by id. What is kept of the oldest goes, here and in `beside`, when there are too many.

    What is `beside` without a response (its request failed) goes when it is twice too much.
    """

    def __init__(
        self, *beside: MutableMapping[str, Any], max_responses: int = MAX_RESPONSES
    ) -> None:
        super().__init__()
        self._beside = beside
        self._max_responses = max_responses

    def __setitem__(self, response_id: str, response: Any) -> None:
        super().__setitem__(response_id, response)
        while len(self) > self._max_responses:
            done = (key for key, kept in self.items() if kept.status not in _RUNNING)
            oldest = next(done, None)
            if oldest is None:
                break
            self._forget(oldest)
        for store in self._beside:
            while len(store) > 2 * self._max_responses:
                del store[next(iter(store))]

    def _forget(self, response_id: str) -> None:
        del self[response_id]
        for store in self._beside:
            store.pop(response_id, None)


def bound_store(module: ModuleType) -> None:
    """Bound the store of `module`'s server. Doing it twice is doing it once."""
    serving = module.OpenAIServingResponses
    if not hasattr(serving.__init__, "__wrapped__"):
        serving.__init__ = _with_bounded_store(serving.__init__)


def _with_bounded_store(initialize: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(initialize)
    def initialize_bounded(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        self.response_store = BoundedStore(self.msg_store, self.event_store)

    return initialize_bounded
