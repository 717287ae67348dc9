"""Where a gateway listens, settled before it starts."""

from __future__ import annotations

from cluster.processes import free_ports, require_free_port
from placement.fleet import GatewaySpec


def checked_ports(gateway: GatewaySpec) -> GatewaySpec:
    """Port 0 becomes a free port; a given one must be free on this node.

    Raises:
        PortInUse: it is not.
    """
    chosen = {}
    for key in ("http_port", "grpc_port"):
        port = getattr(gateway, key) or free_ports(1, gateway.host)[0]
        require_free_port(gateway.host, port, f"the gateway ({key})")
        chosen[key] = port
    return gateway.model_copy(update=chosen)
