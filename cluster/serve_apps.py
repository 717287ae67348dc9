"""Everything bora asks of Ray Serve: one application per model, one deployment per variant.

Three things have no public form in Ray 2.60 (pinned for that reason): an explicit code version, so
that deploying a fleet again restarts only variants whose shape changed; setting a replica count, and
reading the one that was set, without the dashboard's REST server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve.context import _get_global_client

from cluster.names import POOL_LABEL, SLOT
from cluster.replica import DRAIN_TIMEOUT_S, Replica, Site
from cluster.shape_version import shape_version
from placement.plan import Variant

_PREFIX = "bora:"  # of our applications' names


@dataclass(frozen=True, slots=True)
class Deployed:
    """A variant as Serve was last told it (JSON), and the replica count that it aims at."""

    variant: Mapping[str, Any]
    target: int


def start() -> None:
    """Start Serve's controller, without proxies: requests do not go through Ray."""
    serve.start(proxy_location="Disabled")


def deploy(variants: Sequence[Variant], replicas: Mapping[str, int], site: Site) -> None:
    """Create or update the application of one model; returns once Serve has taken it over.

    `variants` all belong to that model; `replicas` gives each its replica count. Serve deploys
    nothing with 0 replicas, only scales to it: such a variant may start one for a moment.
    """
    bound: Any = None
    for variant in reversed(variants):
        siblings = () if bound is None else (bound,)
        deployment = _deployment(variant, replicas[variant.variant])
        bound = deployment.bind(site, siblings)
    target = serve.RunTarget(
        target=bound,
        name=_application(variants[0].model),
        route_prefix=None,
        external_scaler_enabled=True,
    )
    serve.run_many(
        [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
    )
    for variant in variants:
        if replicas[variant.variant] == 0:
            scale(variant, 0)


def deployed() -> dict[str, dict[str, Deployed]]:
    """What Serve runs for bora: by model and variant. Applications of others are not ours."""
    applications = _get_global_client().get_serve_details()["applications"]
    return {
        name.removeprefix(_PREFIX): {
            variant: Deployed(
                variant=details["deployment_config"].get("user_config") or {},
                target=details["target_num_replicas"],
            )
            for variant, details in application["deployments"].items()
        }
        for name, application in applications.items()
        if name.startswith(_PREFIX) and application["status"] != "DELETING"
    }


def scale(variant: Variant, replicas: int) -> None:
    """Set the replica count of a variant that is deployed."""
    deployment = DeploymentID(name=variant.variant, app_name=_application(variant.model))
    ray.get(
        _get_global_client()._controller.update_deployment_replicas.remote(  # noqa: SLF001
            deployment, replicas
        )
    )


def delete(model: str, *, wait: bool) -> None:
    """Stop a model's replicas, each after its running requests, and forget it."""
    serve.delete(_application(model), _blocking=wait)


def bundle(variant: Variant) -> dict[str, float]:
    """Ray resources of one replica: all its GPUs (or slots) on one node."""
    resource = SLOT if variant.gpu == "cpu" else "GPU"
    return {resource: float(_devices(variant))}


def _application(model: str) -> str:
    return _PREFIX + model


def _devices(variant: Variant) -> int:
    if variant.placement:
        return sum(len(node.gpus) for node in variant.placement[0])
    return variant.shape.num_gpus


def _deployment(variant: Variant, replicas: int) -> serve.Deployment:
    resources = bundle(variant)
    actor: dict[str, Any] = {"num_cpus": 0}
    if "GPU" in resources:
        actor["num_gpus"] = resources["GPU"]
    else:
        actor["resources"] = resources
    deployment = serve.deployment(
        Replica,
        name=variant.variant,
        num_replicas=max(replicas, 1),
        ray_actor_options=actor,
        placement_group_bundles=[resources],
        placement_group_bundle_label_selector=[{POOL_LABEL: variant.pool}],
        placement_group_strategy="STRICT_PACK",  # tensor parallelism needs one node
        user_config=variant.model_dump(mode="json"),
        health_check_period_s=1,
        health_check_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=DRAIN_TIMEOUT_S + 15,
        max_constructor_retry_count=3,
    )
    return deployment.options(version=shape_version(variant), _internal=True)
