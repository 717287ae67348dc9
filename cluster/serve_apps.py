"""Everything bora asks of Ray Serve: one application per generation, a variant in one shape.

Of a gang each place is one (`cluster.gang_nodes`).

A changed shape is another application beside the old one, so that who decides when the old one goes
is bora, which knows the capacity that was promised, and not Serve, which knows only replica counts.

Four things have no public form in Ray 2.60 (pinned for that reason): an explicit code version, so
that deploying a fleet again restarts only variants whose shape changed; setting a replica count, and
reading the one that was set, without the dashboard's REST server; the actor of a replica that waits.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray import serve
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.constants import SERVE_NAMESPACE
from ray.serve.context import _get_global_client
from ray.util.placement_group import placement_group_table

from cluster.gang_nodes import NodeWish
from cluster.generations import (
    Deployed,
    GenerationKey,
    ServedReplica,
    bundles,
    key_of,
    selectors,
    spread,
    together,
)
from cluster.replica import DRAIN_TIMEOUT_S, Replica
from cluster.site import Site
from placement.plan import Variant

DISCARD_TIMEOUT_S = 2.0
STOP_TIMEOUT_S = DRAIN_TIMEOUT_S + 15  # then Serve kills a replica that it stops

ANYWHERE = NodeWish()

_NO_PLACE = ("PENDING", "RESCHEDULING")
_PREFIX = "bora:"  # of our applications' names


def start() -> None:
    """Start Serve's controller, without proxies: requests do not go through Ray."""
    serve.start(proxy_location="Disabled")


def deploy(
    variant: Variant,
    replicas: int,
    site: Site,
    place: int = 0,
    wish: NodeWish = ANYWHERE,
    *,
    health_check_s: float = 1.0,
) -> None:
    """Create or update a generation, or a place of it; returns once Serve has taken it over.

    `wish`: that it was created with, or its replicas restart. `health_check_s`: after how long Serve
    looks at a replica again.

    Serve deploys nothing with 0 replicas, only scales to it: such a generation may start one for a
    moment.
    """
    key = key_of(variant)
    target = serve.RunTarget(
        target=_deployment(variant, replicas, wish, health_check_s).bind(site),
        name=_application(key, place),
        route_prefix=None,
        external_scaler_enabled=True,
    )
    serve.run_many(
        [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
    )
    if replicas == 0:
        scale(key, 0, place)


def deployed() -> dict[GenerationKey, Deployed]:
    """What Serve runs for bora. Applications of others are not ours."""
    applications = _get_global_client().get_serve_details()["applications"]
    parts: dict[GenerationKey, dict[int, Deployed]] = {}
    for name, application in sorted(applications.items()):
        if name.startswith(_PREFIX):
            key, place = _key(name)
            parts.setdefault(key, {})[place] = _deployed(application)
    return {key: together(each) for key, each in parts.items()}


def _deployed(application: Mapping[str, Any]) -> Deployed:
    for details in application["deployments"].values():  # there is one
        return Deployed(
            config=details["deployment_config"].get("user_config") or {},
            target=details["target_num_replicas"],
            replicas=tuple(
                ServedReplica(
                    replica=each["replica_id"],
                    state=each["state"],
                    node_id=each.get("node_id") or "",
                    started_s=each["start_time_s"],
                )
                for each in details["replicas"]
            ),
            deleting=application["status"] == "DELETING",
            gave_up=details["status"] == "DEPLOY_FAILED",
        )
    # Serve was told of it a moment ago, or has forgotten all but its name.
    return Deployed(config={}, target=0, deleting=application["status"] == "DELETING")


def scale(key: GenerationKey, replicas: int, place: int = 0) -> None:
    """Set the replica count of a generation, or of a place of it, that is deployed."""
    deployment = DeploymentID(name=key.variant, app_name=_application(key, place))
    ray.get(
        _get_global_client()._controller.update_deployment_replicas.remote(  # noqa: SLF001
            deployment, replicas
        )
    )


def delete(key: GenerationKey, places: Iterable[int], *, wait: bool) -> None:
    """Stop the replicas of these places, each after its running requests, and forget them."""
    for place in places:
        serve.delete(_application(key, place), _blocking=wait)


def discard(key: GenerationKey, place: int) -> None:
    """Forget a place, and end those of its replicas that wait for nodes. Blocks, briefly.

    Serve asks them to stop, which an actor hears only once it has a node: so they are ended here.
    Until Serve has begun to delete it may start another in the place of one that was ended.
    """
    application = _application(key, place)
    serve.delete(application, _blocking=False)
    deployment = DeploymentID(name=key.variant, app_name=application)
    deadline = time.monotonic() + DISCARD_TIMEOUT_S
    while _is_known(key, place) and time.monotonic() < deadline:
        for replica in waiting():
            name = ReplicaID(unique_id=replica, deployment_id=deployment).to_full_id_str()
            with contextlib.suppress(ValueError):  # another deployment's, or gone already
                ray.kill(ray.get_actor(name, namespace=SERVE_NAMESPACE))
        time.sleep(0.1)


def waiting() -> frozenset[str]:
    """Ids of replicas that Ray has no place for, of all applications.

    Ray reads through all groups that there ever were, one for each replica that ever lived.
    """
    return frozenset(
        # Serve names a group after its actor: SERVE_REPLICA::application#deployment#id
        str(group["name"]).rpartition("#")[2]
        for group in placement_group_table().values()
        if group["state"] in _NO_PLACE
    )


def _is_known(key: GenerationKey, place: int) -> bool:
    generation = deployed().get(key)
    return generation is not None and place in generation.parts


def _application(key: GenerationKey, place: int) -> str:
    return f"{_PREFIX}{key.variant}:{key.version}{f'+{place}' if place else ''}"


def _key(application: str) -> tuple[GenerationKey, int]:
    variant, _, version = application.removeprefix(_PREFIX).rpartition(":")
    version, _, place = version.partition("+")
    return GenerationKey(variant, version), int(place or 0)


def _deployment(
    variant: Variant, replicas: int, wish: NodeWish, health_check_s: float
) -> serve.Deployment:
    nodes = bundles(variant)
    resources = nodes[0]  # the leader's; its followers take the others themselves (cluster.gang)
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
        placement_group_bundles=nodes,
        placement_group_bundle_label_selector=selectors(variant, *wish),
        placement_group_strategy=spread(variant),
        user_config=variant.model_dump(mode="json"),
        health_check_period_s=health_check_s,
        health_check_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=STOP_TIMEOUT_S,
        max_constructor_retry_count=3,
    )
    return deployment.options(version=key_of(variant).version, _internal=True)
