"""Seat: the node and the devices that Ray gave to this process, and which of its GPUs it holds."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace

import psutil
import ray

from cluster.devices import DeviceLocks, HeldDevices
from cluster.errors import EngineFailed
from cluster.names import SLOT
from cluster.probes.speeds import GPUS_VARIABLE
from cluster.ray_inventory import node_name
from placement.plan import Variant


@dataclass(frozen=True, slots=True)
class Seat:
    """Of a Ray actor that runs an engine, or a node's share of one."""

    node_id: str
    host: str  # its name
    num_devices: int  # GPUs, or slots on a node without
    gpus: tuple[int, ...] = ()
    devices: HeldDevices | None = None  # None: not held yet, or no GPUs

    @property
    def node(self) -> str:
        """As plans name it."""
        return node_name({"NodeManagerHostname": self.host, "NodeID": self.node_id})


def my_seat() -> Seat:
    """What Ray gave this actor; no GPU is held yet."""
    context = ray.get_runtime_context()
    held = context.get_assigned_resources()
    return Seat(
        node_id=context.get_node_id(),
        host=socket.gethostname(),
        num_devices=round(held.get("GPU", 0.0) or held.get(SLOT, 0.0)),
    )


def with_gpus(seat: Seat, variant: Variant, owner: str, rank: int = 0) -> Seat:
    """The seat with the GPUs of the plan held; as it is on nodes without GPUs. Blocks.

    `rank`: of the node, among those of a replica.

    Raises:
        EngineFailed: the GPUs do not come free.
    """
    context = ray.get_runtime_context()
    given = context.get_accelerator_ids().get("GPU", [])
    if not given:
        return seat
    identifiers = _identifiers(seat.node_id)
    if not set(given) <= set(identifiers):
        raise EngineFailed(
            f"{seat.node}: Ray gave GPU {', '.join(given)}, but the node's are "
            f"{', '.join(identifiers)}: start it with {GPUS_VARIABLE} and CUDA_VISIBLE_DEVICES "
            f"alike (`bora probe --ray-start` prints the command)"
        )
    locks = DeviceLocks(seat.node_id, identifiers)
    held = locks.hold(planned_gpus(variant, seat.node, rank), len(given), owner=owner)
    return replace(seat, gpus=held.gpus, devices=held)


def planned_gpus(variant: Variant, node: str, rank: int = 0) -> list[tuple[int, ...]]:
    """The sets of GPUs that the plan gives replicas of `variant` on a node, those of `rank` first.

    A node that the plan does not name (it came later, or the plan was made for an inventory with
    other names) is like those that it names.
    """
    ranked = [(part, number == rank) for replica in variant.placement
              for number, part in enumerate(replica)]  # fmt: skip
    places = [part for part, _ in sorted(ranked, key=lambda each: not each[1])]
    here = [part.gpus for part in places if part.node == node]
    return here or list(dict.fromkeys(part.gpus for part in places))


def gpus_of_ray_node() -> str | None:
    """What this worker's Ray node was started with: `$BORA_GPUS`, else CUDA_VISIBLE_DEVICES.

    Ray tells the worker itself to see only the GPUs that it was given; None: all of the host's.
    """
    if own := os.environ.get(GPUS_VARIABLE):
        return own
    worker = ray._private.worker.global_worker  # noqa: SLF001 - it keeps what was set before
    visible = worker.original_visible_accelerator_ids.get("GPU")
    return None if visible is None else ",".join(map(str, visible))


def _identifiers(node_id: str) -> list[str]:
    """What CUDA calls the GPUs of this Ray node, by their index in plans."""
    if own := gpus_of_ray_node():
        return own.split(",")
    [node] = [node for node in ray.nodes() if node["NodeID"] == node_id]
    return [str(index) for index in range(int(node["Resources"].get("GPU", 0)))]


def interface_of(address: str) -> str:
    """The network interface of this host that has an IP address.

    Raises:
        EngineFailed: none has it.
    """
    found = psutil.net_if_addrs()
    for name, addresses in found.items():
        if any(each.address == address for each in addresses):
            return name
    raise EngineFailed(
        f"{socket.gethostname()}: no network interface has the node's address {address}, only "
        f"{', '.join(found)}; start Ray there with --node-ip-address"
    )
