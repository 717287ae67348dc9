"""Put controller and gateway on a Ray cluster, and take them off again."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve

from cluster.controller import Controller, end_process_on_failure
from cluster.errors import AlreadyRunning, ClusterUnreachable
from cluster.gateway_host import STOP_S, GatewayHost, gateway_actors, gateway_name
from cluster.host_state import HostState
from cluster.messages import Orders
from cluster.names import CONTROLLER, NAMESPACE
from cluster.priority import CONTROLLER_NICENESS, outrank_engines
from cluster.ray_inventory import ray_inventory
from cluster.ray_survey import RayProbes, Survey, host_states, look, measure
from placement.errors import ConfigError
from placement.fleet import GatewaySpec
from placement.inventory import Inventory
from placement.node_facts import NodeFacts

# Ray keeps the name of every method of an actor's class, inherited and private ones too, and refuses
# to start it again where newer code lacks one. So these have only the methods that are called.


class ControllerActor:
    """Starts by itself: when its process dies Ray makes it anew, but calls nothing on it."""

    async def __init__(self, *arguments: Any) -> None:  # type: ignore[misc]
        outrank_engines(niceness=CONTROLLER_NICENESS)
        self._controller = Controller(*arguments)
        self._start = asyncio.create_task(self._controller.start())
        self._start.add_done_callback(end_process_on_failure)

    async def start(self) -> str:
        """`Controller.start`."""
        return await self._controller.start()

    async def report(self, text: str) -> Orders:
        """`Controller.report`."""
        return await self._controller.report(text)

    async def gateway_ended(self, log_tail: str) -> None:
        """`Controller.gateway_ended`."""
        await self._controller.gateway_ended(log_tail)

    async def stop(self) -> None:
        """`Controller.stop`."""
        await self._controller.stop()


class GatewayActor:
    """As the controller's."""

    async def __init__(self, *arguments: Any) -> None:  # type: ignore[misc]
        outrank_engines()
        self._host = GatewayHost(*arguments)
        await self._host.start()

    async def start(self) -> None:
        """Returns once it has been made."""

    async def stop(self) -> None:
        """`GatewayHost.stop`."""
        await self._host.stop()


HEAD = "node:__internal_head__"  # resource of the head alone, which may share its address

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


def examine_nodes(
    progress: Callable[[str], None], *, quick: bool
) -> tuple[Survey, dict[str, HostState]]:
    """For `bora doctor`: facts of all nodes, their speeds unless `quick`, and their states."""
    nodes = RayProbes().nodes()
    seen = look(nodes, progress)
    states = host_states(nodes)
    if quick:
        return seen, states
    found = measure(nodes, seen.found, progress).found
    return Survey(found, seen.unheard), states


def probe_nodes(progress: Callable[[str], None]) -> tuple[NodeFacts, ...]:
    """What the cluster's nodes have, and where there are GPUs how fast they are."""
    nodes = RayProbes().nodes()
    found = look(nodes, progress).found
    fast = measure(nodes, [facts for facts in found if facts.gpus], progress).found
    measured = {facts.node: facts for facts in fast}
    return tuple(measured.get(facts.node, facts) for facts in found)


def start(
    *,
    run_dir: Path,
    token: str,
    control: tuple[str, int],
    gateway: GatewaySpec,
    engine_host: str | None,
) -> None:
    """Start the controller (listening on `control`) and a gateway on this node, others elsewhere.

    Raises:
        ConfigError: more gateways are wanted than there are nodes.
    """
    host, port = control
    hosts = _hosts_for_gateways(gateway.replicas)
    controller = _actor(
        ControllerActor,
        CONTROLLER,
        hosts[0],
        *(str(run_dir), token, host, port, engine_host),
        max_concurrency=1000,
    )
    arguments = ["--controller", f"http://{host}:{port}", "--host", gateway.host]
    arguments += ["--http-port", str(gateway.http_port), "--grpc-port", str(gateway.grpc_port)]
    arguments += ["--auth", gateway.auth]
    log_file = str(run_dir / "logs" / "gateway.log")
    gateways = [
        _actor(GatewayActor, gateway_name(index), place, arguments, token, log_file)
        for index, place in enumerate(hosts)
    ]
    ray.get([controller.start.remote(), *(each.start.remote() for each in gateways)])


def stop() -> None:
    """End gateway, controller and Serve on a cluster that goes on without bora."""
    for name in (*gateway_actors(), CONTROLLER):
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            actor = ray.get_actor(name, namespace=NAMESPACE)
            with contextlib.suppress(ray.exceptions.RayError):
                # One whose host is away would be waited for; the controller drains engines.
                ray.get(actor.stop.remote(), timeout=None if name == CONTROLLER else STOP_S)
            ray.kill(actor, no_restart=True)
    if not serve.status().applications:  # somebody else's applications keep their Serve
        serve.shutdown()


def _hosts_for_gateways(count: int) -> list[str]:
    """Ray resources that stand for hosts: this one, which the command line knows, then others.

    A node that comes back has another id, and an actor that waits for the old one is given up by
    Ray for ever; the resource comes back with the host.
    """
    own = ray.get_runtime_context().get_node_id()
    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    here = _host(alive[own])
    # Of several nodes at one address Ray names any as this driver's: the head outlives the others.
    at_head = any(HEAD in node["Resources"] and _host(node) == here for node in alive.values())
    first = HEAD if at_head else here
    others = sorted({_host(node) for node in alive.values()} - {here})
    hosts = [first, *others]
    if count > len(hosts):
        raise ConfigError(
            f"gateway.replicas: {count} gateways need a host each, the Ray cluster has {len(hosts)}"
        )
    return hosts[:count]


def _host(node: Mapping[str, Any]) -> str:
    return f"node:{node['NodeManagerAddress']}"


def _actor(kind: type, name: str, host: str, *arguments: Any, **options: Any) -> Any:
    remote = ray.remote(kind).options(name=name, resources={host: 0.001}, **_ACTOR, **options)
    return remote.remote(*arguments)
