"""GatewayConfig: everything that a gateway can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from placement.routing_policy import PREFILL_MIN_TOKENS
from placement.spec import Spec


class Limits(Spec):
    """How long and how many requests wait, and how failures are met."""

    queue_timeout_s: NonNegativeFloat = Field(
        default=30.0, description="A request waits this long while all replicas are busy."
    )
    hold_timeout_s: NonNegativeFloat = Field(
        default=600.0, description="A request waits this long for a model that scales up for it."
    )
    replacement_timeout_s: NonNegativeFloat = Field(
        default=60.0, description="A request waits this long for a lost replica's successor."
    )
    max_queued: NonNegativeInt = Field(default=1024, description="Requests that wait, per model.")
    max_queued_bytes: PositiveInt = Field(
        default=256 * 1024 * 1024, description="Bodies of requests that wait, per model."
    )
    max_attempts: PositiveInt = Field(
        default=3,
        description="Engines that one request may be given to; those that are not reached "
        "do not count.",
    )
    retry_share: NonNegativeFloat = Field(
        default=0.2,
        le=1.0,
        description="Retries after an engine's 429 or 5xx, per request to the model, besides",
    )
    retries_per_s: NonNegativeFloat = Field(
        default=10.0, description="so many retries a second of one worker."
    )
    max_migrations: NonNegativeInt = Field(
        default=10, description="How often one stream may go on at another endpoint."
    )
    stall_timeout_s: PositiveFloat = Field(
        default=10.0,
        description="An engine that is silent for this long in a stream is left for another.",
    )
    prefill_min_tokens: NonNegativeInt = Field(
        default=PREFILL_MIN_TOKENS,
        description="Of a model with prefill endpoints: a prompt is read there from so many tokens on"
        " that the endpoint which answers has not cached.",
    )
    heartbeat_s: PositiveFloat = Field(
        default=10.0,
        description="A stream that waits for an engine gets a comment this often, so that it stays open.",
    )
    suspect_s: NonNegativeFloat = Field(
        default=2.0,
        description="An endpoint that failed is the last choice for this long; should it then"
        " fail again, twice as long, and so on.",
    )
    suspect_max_s: NonNegativeFloat = Field(default=30.0, description="At most so long.")
    breaker_failures: PositiveInt = Field(
        default=3,
        description="Failed requests in a row after which an endpoint gets none, then one to try.",
    )
    health_interval_s: NonNegativeFloat = Field(
        default=1.0, description="How often each engine's /health is asked; 0: never."
    )
    health_timeout_s: PositiveFloat = Field(
        default=1.5,
        description="/health is answered within this time, or the check has failed: the endpoint"
        " is the last choice until it answers.",
    )
    health_failures: PositiveInt = Field(
        default=4,
        description="Failed checks in a row after which an endpoint gets no requests and its"
        " streams are given up.",
    )
    connect_timeout_s: PositiveFloat = 5.0
    max_answer_bytes: PositiveInt = Field(
        default=1024 * 1024 * 1024,
        description="An engine's JSON answer, which is held until it is whole. Streams have no limit.",
    )
    max_body_bytes: PositiveInt = 64 * 1024 * 1024
    max_arriving_bytes: PositiveInt = Field(
        default=1024 * 1024 * 1024,
        description="HTTP bodies that are arriving, of all clients of one worker, and at least"
        " one. Beyond that the largest of them is refused with 503 and retry-after.",
    )
    max_head_bytes: PositiveInt = Field(
        default=64 * 1024, description="Request line and headers of one request."
    )
    max_target_bytes: PositiveInt = Field(default=8 * 1024, description="Path and query.")
    max_headers: PositiveInt = Field(default=128, description="Headers of one request.")
    header_timeout_s: PositiveFloat = Field(
        default=10.0, description="A request's headers arrive within this time, or it is refused."
    )
    body_timeout_s: PositiveFloat = Field(
        default=30.0,
        description="A body arrives within this time, and 1 s more for every 64 KiB of it.",
    )
    idle_timeout_s: PositiveFloat = Field(
        default=75.0, description="A client's connection without a request is closed."
    )
    send_timeout_s: PositiveFloat = Field(
        default=60.0, description="A client that takes no byte for this long is hung up on."
    )


class GatewayConfig(Spec):
    """One gateway. The endpoint table comes either from a file or from a controller."""

    endpoints_file: Path | None = None
    controller_url: str | None = Field(default=None, pattern=r"^https?://[^\s]+$")
    controller_token: str | None = Field(default=None, repr=False)
    kept_file: Path | None = Field(
        default=None, description="Where the controller's last answer outlives the gateway."
    )
    auth: Literal["none", "keys"] = Field(
        default="none", description="`keys`: only with an API key, see `bora keys`."
    )
    keys_file: Path | None = Field(
        default=None, description="Tenants and their keys; with a controller they come from it."
    )
    shared_cells_file: Path | None = Field(
        default=None, description="Of several workers: where they count limits together."
    )
    host: str = "127.0.0.1"
    http_port: NonNegativeInt = Field(default=8000, le=65535, description="0: any free port.")
    grpc_port: NonNegativeInt | None = Field(default=8001, le=65535, description="None: no gRPC.")
    workers: PositiveInt = Field(
        default=1,
        description="Processes that share the ports, and each endpoint's `max_in_flight`.",
    )
    drain_timeout_s: NonNegativeFloat = Field(
        default=30.0, description="After SIGTERM, running requests may take this long to finish."
    )
    poll_s: PositiveFloat = Field(
        default=0.5, description="How often the endpoints file is looked at."
    )
    access_log: bool = True
    access_log_sample: NonNegativeFloat = Field(
        default=1.0, le=1.0, description="Share of the requests logged; failures always are."
    )
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _one_table_source(self) -> Self:
        if (self.endpoints_file is None) == (self.controller_url is None):
            raise ValueError("give an endpoints file or a controller's URL: one of the two")
        return self

    @model_validator(mode="after")
    def _keys_from_somewhere(self) -> Self:
        if self.auth == "keys" and self.controller_url is None and self.keys_file is None:
            raise ValueError(
                "auth: keys needs a key file: give --keys FILE, which `bora keys create NAME"
                " --file FILE` makes"
            )
        if self.keys_file is not None and (self.auth == "none" or self.controller_url is not None):
            raise ValueError("a key file goes with `auth: keys` and without a controller")
        return self
