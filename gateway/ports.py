"""Ports: found free or taken before anything starts, and held for workers that share them."""

from __future__ import annotations

import contextlib
import errno
import socket
from random import SystemRandom

from gateway.errors import StartupFailed

_FREE_PORTS = range(20_000, 30_000)
_given: set[int] = set()  # to somebody of this process, who may not listen there yet


def free_ports(count: int, host: str = "127.0.0.1", among: range = _FREE_PORTS) -> list[int]:
    """Distinct TCP ports of `host` that nobody has now, for servers that start in a moment.

    From a range of which nobody is given a port meanwhile: the system takes those for connections and
    for port 0 from 32768 on, and a vLLM or Ray that starts takes dozens; Ray's workers stay below.
    One process is given each port once, until it had them all.

    Raises:
        OSError: there are none, or `host` is no address of this machine.
    """
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        # Sorting is stable: those that were given before are the last, in random order as well.
        for port in sorted(SystemRandom().sample(among, len(among)), key=_given.__contains__):
            if _is_free(host, port, stack):
                found.append(port)
                if len(found) == count:
                    _given.update(found)
                    return found
    raise OSError(errno.EADDRINUSE, f"no {count} ports are free in {among}")


def free_ports_in_a_row(count: int, host: str = "127.0.0.1") -> int:
    """The first of `count` adjacent ports, as `free_ports` finds them. Raises as that."""
    firsts = _FREE_PORTS[: len(_FREE_PORTS) - count + 1]
    for first in SystemRandom().sample(firsts, len(firsts)):
        with contextlib.ExitStack() as stack:
            if all(_is_free(host, port, stack) for port in range(first, first + count)):
                return first
    raise OSError(errno.EADDRINUSE, f"no {count} ports in a row are free in {_FREE_PORTS}")


def _is_free(host: str, port: int, stack: contextlib.ExitStack) -> bool:
    """Whether nobody has it; then it is held until `stack` ends."""
    sock = stack.enter_context(socket.socket())
    try:
        sock.bind((host, port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


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
