"""Endpoints: how the gateway reaches replicas, and the versioned table it gets them from.

The table comes from a file (`bora gateway --endpoints`) or from the cluster's controller, which the
gateway asks with `SyncRequest` and which answers with `SyncResponse` as soon as the table changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from gateway.ledger import Spent, UsageReport
from gateway.tenants import KeyTable
from placement.routing_policy import Role, RoutingPolicy
from placement.spec import Spec

EngineKind = Literal["vllm", "llamacpp", "sim"]


class Endpoint(Spec):
    """One replica's OpenAI-compatible HTTP server."""

    model: str = Field(min_length=1, description="What clients send as `model`.")
    url: str = Field(pattern=r"^https?://[^\s/]+$", description="Scheme, host and port, no path.")
    variant: str = "static"
    role: Role = Field(
        "whole",
        description="`prefill`: gets prompts only, whose KV cache a `decode` endpoint then fetches.",
    )
    id: str = Field("", description="Replica id; empty: the URL.")
    served_model_name: str | None = Field(None, description="The engine's name; None: `model`.")
    max_in_flight: PositiveInt = Field(256, description="Requests it runs or queues at once.")
    max_model_len: PositiveInt | None = Field(None, description="Context, tokens.")
    api_key: str | None = Field(None, description="Bearer token the engine asks for.", repr=False)
    state: Literal["ready", "draining"] = "ready"
    engine: EngineKind | None = Field(
        None, description="What runs there; None: the gateway asks it."
    )
    tokens_per_s: PositiveFloat | None = Field(
        None,
        description="Output tokens per second of the whole replica, as planned; None: in"
        " proportion to `max_in_flight`. What is observed corrects it.",
    )
    capabilities: tuple[str, ...] = Field(
        (), description="`vision`, `embeddings`, ...; empty: those of the model."
    )
    adapters: Mapping[str, str] = Field(
        default_factory=dict,
        description="LoRA adapters that are loaded there: what clients send as `model`, and the"
        " engine's name for it.",
    )

    @property
    def key(self) -> str:
        """Identity within a table."""
        return self.id or self.url


class ServedModel(Spec):
    """A model that clients may name, also while it has no endpoint (starting, scaled to zero)."""

    name: str
    aliases: tuple[str, ...] = ()
    created: NonNegativeInt = 0
    max_model_len: PositiveInt | None = None
    capabilities: tuple[str, ...] = ()
    scalable: bool = Field(
        False, description="A replica starts when a request waits, so that holding it makes sense."
    )
    managed: bool = Field(
        False, description="A lost replica is replaced: a request that lost its own may wait."
    )
    routing: RoutingPolicy = Field(
        RoutingPolicy(), description="How its requests are spread over its endpoints."
    )
    fallback: tuple[str, ...] = Field(
        (), description="Models that answer in its place when it cannot, in this order."
    )
    adapters: tuple[str, ...] = Field(
        (), description="Names of its LoRA adapters, loaded anywhere or not yet."
    )
    parent: str | None = Field(None, description="The model that this is an adapter of.")


class EndpointTable(Spec):
    """All that the gateway routes to. `version` grows with every change."""

    version: NonNegativeInt = 0
    models: tuple[ServedModel, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()


class EndpointsFile(Spec):
    """The form of `bora gateway --endpoints FILE`."""

    endpoints: tuple[Endpoint, ...] = Field(min_length=1)
    models: tuple[ServedModel, ...] = Field((), description="Optional: aliases and metadata.")


class ModelLoad(Spec):
    """What one gateway saw of a model since its last report."""

    in_flight: NonNegativeFloat = Field(description="Requests at engines, time-averaged.")
    queued: NonNegativeInt = Field(description="Requests held now, waiting for an endpoint.")
    requests_total: NonNegativeInt = Field(description="Accepted since the gateway started.")


class SyncRequest(Spec):
    """POST /v1/sync: a gateway reports its load and waits for a table newer than `version`."""

    gateway: str
    version: int = Field(-1, description="Of the table it has; -1: none yet.")
    wait_s: NonNegativeFloat = Field(0.5, le=30.0)
    loads: Mapping[str, ModelLoad] = Field(default_factory=dict)
    keys_version: int = Field(-1, description="Of the key table it has; -1: none yet.")
    wants_keys: bool = Field(False, description="It lets nobody in without a key.")
    usage: UsageReport | None = None


class SyncResponse(Spec):
    """The newest tables, or None for what did not change within `wait_s`."""

    table: EndpointTable | None = None
    changed_s: NonNegativeFloat = Field(
        0.0,
        description="When the controller heard of the first change that the gateway's own table"
        " lacks, epoch seconds; 0: it has none, or the controller no longer knows.",
    )
    keys: KeyTable | None = None
    usage_sequence: int | None = Field(None, description="Of the usage report that was taken.")
    spent: Mapping[str, Spent] = Field(
        default_factory=dict, description="By tenants with a budget, that report included."
    )
