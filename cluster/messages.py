"""What replicas, controller and command line tell each other: frozen values, sent as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from placement.inventory import Inventory
from placement.node_facts import NodeFacts
from placement.routing_policy import Role
from placement.spec import Spec
from placement.speed_window import SpeedWindow

ReplicaState = Literal["starting", "ready", "unhealthy", "draining", "stopped", "failed"]
EventKind = Literal[
    "note", "replica-started", "replica-ready", "replica-unhealthy", "replica-draining",
    "replica-stopped", "replica-died", "replica-lost", "scaled", "deployed", "deleted", "drained",
    "calibration", "gateway", "node-joined", "node-lost", "node-unprobed", "mismatch",
    "rollout", "no-place", "adapter", "weights",
]  # fmt: skip


class RankPlace(Spec):
    """A follower of a replica whose engine has ranks on several nodes."""

    node: str
    node_id: str  # Ray's
    gpus: tuple[int, ...] = ()  # indices on that node
    num_devices: int = 0
    pid: int = 0
    stage: str = ""  # what a starting engine is doing
    status: int | None = None  # that its share of the engine ended with
    log_file: str = ""
    log_tail: str = ""  # of a share that ended


@dataclass(frozen=True, slots=True)
class Orders:
    """The controller's answer to a heartbeat."""

    next_report_s: float = 1.0  # until the next one, if nothing changes before
    retire_within_s: float | None = None  # finish and go; None: serve on


class ReplicaReport(Spec):
    """A replica's heartbeat, about once a second."""

    replica: str
    model: str
    variant: str
    state: ReplicaState
    version: str = ""  # of the shape that the engine was started with
    stage: str = ""  # what a starting engine is doing
    started_s: float = 0.0  # epoch seconds
    number: int = 0  # of this report, among the replica's own
    node: str = ""
    node_id: str = ""  # Ray's
    gpus: tuple[int, ...] = ()  # indices on that node
    num_devices: int = 0  # GPUs, or slots on a node without
    followers: tuple[RankPlace, ...] = ()  # on other nodes, by rank from 1 on
    pid: int = 0  # of the engine
    url: str = ""
    api_key: str = ""
    log_file: str = ""
    log_tail: str = ""  # of a failed engine
    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    kv_cache_tokens: int | None = None
    weights_bytes: int | None = None
    adapters: Mapping[str, str] = Field(default_factory=dict)  # loaded: name, and the engine's name
    adapter_failures: Mapping[str, str] = Field(default_factory=dict)  # why others are not
    adapter_stages: Mapping[str, str] = Field(default_factory=dict)  # how far those are that come
    expert_balance: float | None = None  # mean load of ranks over the largest, 0..1
    speed: SpeedWindow | None = None  # the last one, again and again until the next


class ReplicaStatus(Spec):
    """One row of `bora status`. The engine's API key stays out of it."""

    replica: str
    state: ReplicaState
    stage: str
    age_s: float
    node: str
    node_id: str = ""
    gpus: tuple[int, ...] = ()
    followers: tuple[RankPlace, ...] = ()
    pid: int
    url: str
    log_file: str
    log_tail: str
    running: int
    waiting: int
    kv_cache_usage: float
    kv_cache_tokens: int | None
    weights_bytes: int | None
    adapters: Mapping[str, str] = Field(default_factory=dict)
    adapter_failures: Mapping[str, str] = Field(default_factory=dict)
    adapter_stages: Mapping[str, str] = Field(default_factory=dict)
    expert_balance: float | None = None


class ComparedSpeed(Spec):
    """A window of a replica, and what was planned for its load."""

    concurrency: float
    input_tokens: float
    output_tokens: float
    prefix_hit: float
    predicted_ttft_s: float
    observed_ttft_s: float
    ttft_error: float  # relative, that the prediction may be wrong by
    predicted_tpot_ms: float
    observed_tpot_ms: float
    tpot_error: float


class SpeedStatus(Spec):
    """How fast a variant's engines are, beside the plan."""

    windows: int  # that counted
    last: ComparedSpeed | None  # the newest of them
    not_counted: str  # why the newest window of all was not


class VariantStatus(Spec):
    """A variant: wanted and actual."""

    model: str
    aliases: tuple[str, ...]
    variant: str
    engine: str
    pool: str
    role: Role = "whole"
    ready: int  # of the planned shape; others are being replaced
    wanted: int
    min_replicas: int
    max_replicas: int
    in_flight: float
    queued: int
    planned_kv_cache_tokens: int
    planned_weights_bytes: int
    replicas: tuple[ReplicaStatus, ...]
    last_event: str
    last_event_s: float = 0.0  # epoch seconds; 0: there was none
    gpu: str = ""
    gpus_per_replica: int = 1
    failure: str = ""  # why it does not start, with the end of the engine's log
    waiting: str = ""  # which resource is missing where, for replicas that Ray has no place for
    misplaced: tuple[str, ...] = ()  # what is not as planned about places and memory
    rollout: str = ""  # how far the replacement of an older shape is
    adapters: Mapping[str, str] = Field(default_factory=dict)  # wanted: name, and its source
    speed: SpeedStatus | None = None  # None: nobody has asked it anything for long enough


class Event(Spec):
    """Something that happened."""

    number: int = 0  # grows by one each
    at_s: float  # epoch seconds
    kind: EventKind = "note"
    model: str = ""
    replica: str = ""
    node: str = ""
    text: str
    reason: str = ""


class EventList(Spec):
    """GET /v1/events?after=NUMBER."""

    events: tuple[Event, ...]


class LogQuery(Spec):
    """POST /v1/logs: a part of a log of bora's that lies on a node."""

    node_id: str  # Ray's
    file: str
    offset: int | None = None  # whole lines from this byte on; None: the last `lines`
    lines: int = Field(default=100, ge=1, le=100_000)
    partial: bool = False  # the last line counts though its end is missing


class LogPart(Spec):
    """Its answer. `offset`: where the next part begins."""

    lines: tuple[str, ...] = ()
    offset: int = 0
    missing: bool = False  # there is no such file, or not yet
    problem: str = ""  # why the node does not tell


class NodeList(Spec):
    """GET /v1/nodes."""

    nodes: tuple[NodeFacts, ...]
    pending: tuple[str, ...] = ()  # that are being probed
    declared: Inventory | None = None  # by the nodes' labels; None: they contradict each other


class LoopTime(Spec):
    """How long rounds of one of the controller's loops take."""

    name: str
    rounds: int  # that were counted, the last ones
    p50_s: float
    p99_s: float


class FleetStatus(Spec):
    """GET /v1/status."""

    fleet: str
    table_version: int
    variants: tuple[VariantStatus, ...]
    gateways: tuple[str, ...]
    gateway_failure: str = ""  # the end of the log of a gateway that ended, until one reports
    events: tuple[Event, ...]
    loops: tuple[LoopTime, ...] = ()


class ScaleRequest(Spec):
    """POST /v1/scale."""

    model: str
    replicas: int


class DrainRequest(Spec):
    """POST /v1/drain."""

    target: str  # a replica's id, or a node's name, host or Ray id
    timeout_s: float = 600.0


class Drained(Spec):
    """What `bora drain` waits for: these replicas are told to finish and go."""

    node_id: str = ""  # that is drained as a whole; empty: only the replica
    replicas: tuple[str, ...]


class DeleteRequest(Spec):
    """POST /v1/delete."""

    model: str
