"""Put controller and gateway on a Ray cluster, and take them off again."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.controller import Controller, end_process_on_failure
from cluster.errors import AlreadyRunning, ClusterUnreachable
from cluster.gateway_host import GatewayHost
from cluster.names import CONTROLLER, GATEWAY, NAMESPACE
from cluster.ray_inventory import ray_inventory
from placement.fleet import GatewaySpec
from placement.inventory import Inventory


class ControllerActor(Controller):
    """Starts by itself: when its process dies Ray makes it anew, but calls nothing on it."""

    async def __init__(self, *arguments: Any) -> None:  # type: ignore[misc]
        super().__init__(*arguments)
        self._start = asyncio.create_task(self.start())
        self._start.add_done_callback(end_process_on_failure)


class GatewayActor(GatewayHost):
    """As the controller's."""

    async def __init__(self, *arguments: Any) -> None:  # type: ignore[misc]
        super().__init__(*arguments)
        await self.start()


# Neither takes a CPU away from engines, and both come back when their process dies.
_ACTOR = {"num_cpus": 0, "lifetime": "detached", "max_restarts": -1, "namespace": NAMESPACE}


def connect(address: str) -> None:
    """Join the Ray cluster at `address` as a driver.

    Raises:
        ClusterUnreachable: nothing answers there, or the token is wrong.
    """
    _require_listener(address)  # Ray itself would try for minutes
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ClusterUnreachable(f"no Ray cluster answers at {address}: {error}") from error


def _require_listener(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ValueError as error:
        raise ClusterUnreachable(f"{address!r} is no address; expected HOST:PORT") from error
    except OSError as error:
        raise ClusterUnreachable(f"no Ray cluster listens at {address}: {error}") from error


def listens(address: str) -> bool:
    """Whether anything listens there."""
    try:
        _require_listener(address)
    except ClusterUnreachable:
        return False
    return True


def require_none() -> None:
    """Refuse to share a Ray cluster with somebody's bora.

    Raises:
        AlreadyRunning: there is one.
    """
    with contextlib.suppress(ValueError):
        ray.get_actor(CONTROLLER, namespace=NAMESPACE)
        raise AlreadyRunning(
            "a bora already runs on this Ray cluster; use the account (or BORA_STATE) that "
            "deployed it, or let its owner run `bora down`"
        )


def disconnect() -> None:
    """Leave the cluster; what was started on it goes on."""
    ray.shutdown()


def node_address() -> str:
    """This node's address, as other nodes see it."""
    return str(ray.util.get_node_ip_address())


def inventory() -> Inventory:
    """What the cluster's nodes offer, from their labels.

    Raises:
        ConfigError: no node carries bora's labels.
    """
    return ray_inventory(ray.nodes())


def start(
    *,
    run_dir: Path,
    token: str,
    control: tuple[str, int],
    gateway: GatewaySpec,
    engine_host: str | None,
) -> None:
    """Start the controller (listening on `control`) and a gateway on this node."""
    host, port = control
    controller = _actor(
        ControllerActor,
        CONTROLLER,
        *(str(run_dir), token, host, port, engine_host),
        max_concurrency=1000,
    )
    arguments = ["--controller", f"http://{host}:{port}", "--host", gateway.host]
    arguments += ["--http-port", str(gateway.http_port), "--grpc-port", str(gateway.grpc_port)]
    arguments += ["--auth", gateway.auth]
    log_file = str(run_dir / "logs" / "gateway.log")
    host_actor = _actor(GatewayActor, GATEWAY, arguments, token, log_file)
    ray.get([controller.start.remote(), host_actor.start.remote()])


def stop() -> None:
    """End gateway, controller and Serve on a cluster that goes on without bora."""
    for name in (GATEWAY, CONTROLLER):
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            actor = ray.get_actor(name, namespace=NAMESPACE)
            ray.get(actor.stop.remote())
            ray.kill(actor, no_restart=True)
    if not serve.status().applications:  # somebody else's applications keep their Serve
        serve.shutdown()


def _actor(kind: type, name: str, *arguments: Any, **options: Any) -> Any:
    # They listen on this node's address, so that they start, and start again, on this node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(kind).options(name=name, scheduling_strategy=here, **_ACTOR, **options)
    return remote.remote(*arguments)
