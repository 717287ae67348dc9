"""From reports to what `bora status` shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cluster.lifecycle import Lifecycle
from cluster.messages import Event, ReplicaReport, ReplicaStatus, SpeedStatus, VariantStatus
from gateway.endpoints import ModelLoad
from placement.plan import Variant


def variant_status(
    variant: Variant,
    reports: Sequence[ReplicaReport],
    *,
    ready: int,
    wanted: int,
    load: ModelLoad,
    events: Iterable[Event],
    failure: str,
    lifecycle: Lifecycle,
    speed: SpeedStatus | None,
    now_s: float,
) -> VariantStatus:
    """One variant, wanted and actual."""
    own = [event for event in events if event.model == variant.model]
    return VariantStatus(
        model=variant.model,
        aliases=variant.aliases,
        variant=variant.variant,
        engine=variant.shape.engine,
        pool=variant.pool,
        role=variant.role,
        ready=ready,
        wanted=wanted,
        min_replicas=variant.bounds.min,
        max_replicas=variant.bounds.max,
        in_flight=load.in_flight,
        queued=load.queued,
        planned_kv_cache_tokens=variant.shape.kv_cache_tokens,
        planned_weights_bytes=variant.shape.per_gpu.weights_bytes,
        replicas=tuple(_replica_status(report, now_s) for report in reports),
        last_event=own[-1].text if own else "",
        last_event_s=own[-1].at_s if own else 0.0,
        gpu=variant.gpu,
        gpus_per_replica=variant.gpus_per_replica,
        failure=failure,
        waiting=lifecycle.places.waiting(variant.variant),
        misplaced=lifecycle.places.misplaced(variant.variant),
        rollout=lifecycle.rollouts.stage(variant.model),
        adapters=variant.adapters,
        speed=speed,
    )


def _replica_status(report: ReplicaReport, now_s: float) -> ReplicaStatus:
    shown = report.model_dump(include=set(ReplicaStatus.model_fields))
    return ReplicaStatus(**shown, age_s=round(now_s - report.started_s, 1))
