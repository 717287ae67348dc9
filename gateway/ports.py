"""Ports: found taken before anything starts, and held for workers that share them."""

from __future__ import annotations

import socket

from gateway.errors import StartupFailed


def require_free_port(host: str, port: int) -> None:
    """See that nobody listens on `port`, which SO_REUSEPORT would hide.

    Raises:
        StartupFailed: somebody does, or `host` is no address of this machine.
    """
    _bound(host, port, reuse_port=False).close()


def hold_port(host: str, port: int) -> socket.socket:
    """A socket that keeps `port` (0: any) for listeners with SO_REUSEPORT. It does not listen itself.

    Raises:
        StartupFailed: as `require_free_port`.
    """
    if port:
        require_free_port(host, port)
    return _bound(host, port, reuse_port=True)


def cannot_listen(host: str, port: int, error: Exception) -> StartupFailed:
    """The error for a port that could not be had."""
    reason = getattr(error, "strerror", None) or str(error)
    return StartupFailed(
        f"cannot listen on {host}:{port}: {reason}; choose another host or port, or stop what"
        " listens there"
    )


def _bound(host: str, port: int, *, reuse_port: bool) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        result = socket.socket(family, kind)
        try:
            result.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            result.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(reuse_port))
            result.bind(address)
        except OSError:
            result.close()
            raise
    except OSError as error:
        raise cannot_listen(host, port, error) from error
    return result
