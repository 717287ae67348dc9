"""GrpcServer: both gRPC services, `grpc.health.v1.Health` and reflection, on a port of their own."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gateway import grpc_api
from gateway.config import Limits
from gateway.forwarding import Forwarder
from gateway.grpc_api import GrpcApi
from gateway.oip import api as oip_api
from gateway.oip.api import OipApi

_SERVICES = (grpc_api.SERVICE, oip_api.SERVICE)
_PING_EVERY_MS = 30_000  # load balancers drop what is silent for 60 s or more
_PING_TIMEOUT_MS = 20_000


class GrpcServer:
    """Serves until `stop`."""

    def __init__(self, forwarder: Forwarder, *, reuse_port: bool) -> None:
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            options=_options(forwarder.admission.limits, reuse_port=reuse_port)
        )
        self._server.add_generic_rpc_handlers(
            (GrpcApi(forwarder).handlers(), OipApi(forwarder).handlers())
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises `RuntimeError` if it is taken."""
        await self.set_ready(ready=False)
        bound: int = self._server.add_insecure_port(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        )
        await self._server.start()
        return bound

    async def set_ready(self, *, ready: bool) -> None:
        """What the health service says."""
        states = health_pb2.HealthCheckResponse
        state = states.SERVING if ready else states.NOT_SERVING
        for service in ("", *_SERVICES):
            await self._health.set(service, state)

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, and end those that still run after `grace_s`."""
        await self._server.stop(grace_s)


def _options(limits: Limits, *, reuse_port: bool) -> list[tuple[str, int]]:
    """No compression: chunks are small, and text within a data centre is not worth the CPU."""
    return [
        ("grpc.so_reuseport", int(reuse_port)),
        ("grpc.max_receive_message_length", limits.max_body_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", limits.max_head_bytes),
        # Ping through silences, during calls and between them.
        ("grpc.keepalive_time_ms", _PING_EVERY_MS),
        ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Clients and proxies may ping as often as they like; gRPC's own servers hang up on them.
        ("grpc.http2.max_ping_strikes", 0),
    ]
