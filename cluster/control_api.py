"""The controller's HTTP face, and the client that the command line talks to it with."""

from __future__ import annotations

import hmac
import http.client
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Protocol, TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from cluster.errors import ClusterError, ClusterUnreachable
from cluster.key_messages import (
    CreateKeyRequest,
    KeyList,
    NewKey,
    RevokedKeys,
    RevokeKeyRequest,
    UsageQuery,
    UsageTotals,
)
from cluster.messages import (
    DeleteRequest,
    Drained,
    DrainRequest,
    EventList,
    FleetStatus,
    LogPart,
    LogQuery,
    NodeList,
    ScaleRequest,
)
from cluster.sync_desk import SyncText
from gateway.endpoints import SyncRequest, SyncResponse
from placement.errors import PlacementError, UnknownName
from placement.inventory import Inventory
from placement.plan import Plan

Body = TypeVar("Body", bound=BaseModel)
Told = TypeVar("Told", bound=BaseModel | None)
log = logging.getLogger("bora.control_api")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Control(Protocol):
    """What the API asks of the controller."""

    async def sync(self, request: SyncRequest) -> SyncResponse:
        """Exchange a gateway's load for the endpoint table."""
        ...

    async def stop(self) -> None:
        """Let requests finish, then stop gateways and engines."""
        ...

    async def inventory(self) -> Inventory:
        """What the cluster's nodes offer."""
        ...

    async def plan(self) -> Plan | None:
        """What the cluster serves."""
        ...

    def status(self) -> FleetStatus:
        """The state of the fleet."""
        ...

    def events(self, after: int) -> EventList:
        """What happened since the event with this number."""
        ...

    def nodes(self) -> NodeList:
        """What probes found on the nodes."""
        ...

    async def logs(self, query: LogQuery) -> LogPart:
        """A part of a log, from the node that it lies on."""
        ...

    @property
    def fleet(self) -> FleetControl:
        """Models that serve."""
        ...

    @property
    def keys(self) -> KeyControl:
        """Tenants, keys and usage."""
        ...


class FleetControl(Protocol):
    """What the API asks about models."""

    async def apply(self, plan: Plan) -> None:
        """Serve exactly this plan."""
        ...

    async def scale(self, model: str, replicas: int) -> None:
        """Set a replica count."""
        ...

    async def drain(self, request: DrainRequest) -> Drained:
        """Empty a replica or a node."""
        ...

    async def delete(self, model: str) -> None:
        """Take a model out."""
        ...


class KeyControl(Protocol):
    """What the API asks about keys."""

    async def create(self, request: CreateKeyRequest) -> NewKey:
        """Make a key."""
        ...

    async def revoke(self, request: RevokeKeyRequest) -> RevokedKeys:
        """Take a tenant or a key away."""
        ...

    async def list(self) -> KeyList:
        """All tenants."""
        ...

    async def usage(self, query: UsageQuery) -> UsageTotals:
        """What was used."""
        ...


async def serve_control_api(control: Control, host: str, port: int, token: str) -> web.AppRunner:
    """Listen on `host:port`; every request needs `Authorization: Bearer TOKEN`.

    `cleanup()` of what is returned ends it.
    """
    app = web.Application(middlewares=[_errors, _guard(token)], client_max_size=16 * 2**20)
    app.add_routes(
        [
            web.post("/v1/sync", _on_body(SyncRequest, control.sync, SyncText().of)),
            web.post("/v1/apply", _on_body(Plan, control.fleet.apply)),
            web.post(
                "/v1/scale",
                _on_body(ScaleRequest, lambda body: control.fleet.scale(body.model, body.replicas)),
            ),
            web.post(
                "/v1/delete", _on_body(DeleteRequest, lambda body: control.fleet.delete(body.model))
            ),
            web.post("/v1/drain", _on_body(DrainRequest, control.fleet.drain)),
            web.post("/v1/stop", _no_body(control.stop)),
            web.get("/v1/inventory", _no_body(control.inventory)),
            web.get("/v1/plan", _no_body(control.plan)),
            web.get("/v1/status", _at_once(control.status)),
            web.get("/v1/nodes", _at_once(control.nodes)),
            web.get("/v1/events", _events(control)),
            web.post("/v1/logs", _on_body(LogQuery, control.logs)),
            web.get("/v1/keys", _no_body(control.keys.list)),
            web.post("/v1/keys", _on_body(CreateKeyRequest, control.keys.create)),
            web.post("/v1/keys/revoke", _on_body(RevokeKeyRequest, control.keys.revoke)),
            web.post("/v1/usage", _on_body(UsageQuery, control.keys.usage)),
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error has a JSON body: `{"error": what is wrong}`."""
    try:
        return await handler(request)
    except web.HTTPException as error:  # aiohttp's own: no such path, body too large
        return _refusal(error.status, error.reason)
    except UnknownName as error:
        return _refusal(404, str(error))
    except PlacementError as error:
        return _refusal(400, str(error))
    # The edge of the controller: a bug must reach the one who asked and the log, and the
    # controller, which holds the fleet together, goes on.
    except Exception as error:
        log.exception("%s %s failed", request.method, request.path)
        return _refusal(500, f"{type(error).__name__}: {error}")


def _guard(token: str) -> Any:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("authorization", "").encode(errors="surrogateescape")
        if not hmac.compare_digest(given, f"Bearer {token}".encode()):
            return _refusal(401, "wrong or missing token")
        return await handler(request)

    return guard


def _text(value: BaseModel | None) -> str:
    return "{}" if value is None else value.model_dump_json()


def _on_body(
    form: type[Body],
    act: Callable[[Body], Awaitable[Told]],
    text: Callable[[Told], str] = _text,
) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        try:
            body = form.model_validate_json(await request.read())
        except ValidationError as error:
            return _refusal(400, str(error))
        return _answer(text(await act(body)))

    return handler


def _no_body(act: Callable[[], Awaitable[BaseModel | None]]) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        del request
        return _answer(_text(await act()))

    return handler


def _refusal(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)


def _answer(text: str) -> web.Response:
    return web.Response(text=text, content_type="application/json")


def _at_once(tell: Callable[[], BaseModel]) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        del request
        return _answer(_text(tell()))

    return handler


def _events(control: Control) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        after = request.query.get("after", "0")
        if not after.isdecimal():
            return _refusal(400, f"after={after!r}: expected the number of an event")
        return _answer(_text(control.events(int(after))))

    return handler


# Not by way of a proxy that the environment names: that one cannot reach it, and must not see tokens.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ControlClient:
    """The command line's side of the API; blocking, since a command does one thing at a time.

    Every call raises:
        ClusterUnreachable: no controller answers, or one that does not know the token.
        ClusterError: it refuses (exit code 2), or it failed (1); with what it said.
    """

    def __init__(self, url: str, token: str, timeout_s: float = 120.0) -> None:
        self._url = url
        self._token = token
        self._timeout_s = timeout_s

    def status(self) -> FleetStatus:
        """The state of the fleet."""
        return self._read(FleetStatus, self._call("GET", "/v1/status"))

    def events(self, after: int = 0) -> EventList:
        """What happened since the event with this number, as far as it is kept."""
        return self._read(EventList, self._call("GET", f"/v1/events?after={after}"))

    def logs(self, query: LogQuery) -> LogPart:
        """A part of a log, from the node that it lies on."""
        return self._read(LogPart, self._call("POST", "/v1/logs", query))

    def nodes(self) -> NodeList:
        """What probes found on the nodes."""
        return self._read(NodeList, self._call("GET", "/v1/nodes"))

    def apply(self, plan: Plan) -> None:
        """Serve exactly this plan."""
        self._call("POST", "/v1/apply", plan)

    def scale(self, model: str, replicas: int) -> None:
        """Set a replica count."""
        self._call("POST", "/v1/scale", ScaleRequest(model=model, replicas=replicas))

    def delete(self, model: str) -> None:
        """Take a model out of the fleet."""
        self._call("POST", "/v1/delete", DeleteRequest(model=model))

    def drain(self, target: str, timeout_s: float) -> Drained:
        """Empty a replica or a node; returns when that has begun."""
        request = DrainRequest(target=target, timeout_s=timeout_s)
        return self._read(Drained, self._call("POST", "/v1/drain", request))

    def stop(self) -> None:
        """Let running requests finish, then stop gateways and engines."""
        self._call("POST", "/v1/stop")

    def inventory(self) -> Inventory:
        """What the cluster's nodes offer; refused when no node carries bora's labels."""
        return self._read(Inventory, self._call("GET", "/v1/inventory"))

    def plan(self) -> Plan | None:
        """What the cluster serves; None: nothing yet."""
        text = self._call("GET", "/v1/plan")
        return None if text == "{}" else self._read(Plan, text)

    def keys(self) -> KeyList:
        """All tenants."""
        return self._read(KeyList, self._call("GET", "/v1/keys"))

    def create_key(self, request: CreateKeyRequest) -> NewKey:
        """Make a key."""
        return self._read(NewKey, self._call("POST", "/v1/keys", request))

    def revoke_key(self, name: str) -> RevokedKeys:
        """Take a tenant or a key away."""
        answer = self._call("POST", "/v1/keys/revoke", RevokeKeyRequest(name=name))
        return self._read(RevokedKeys, answer)

    def usage(self, query: UsageQuery) -> UsageTotals:
        """What was used."""
        return self._read(UsageTotals, self._call("POST", "/v1/usage", query))

    def _call(self, method: str, path: str, body: BaseModel | None = None) -> str:
        request = urllib.request.Request(  # noqa: S310 - our own http:// URL
            self._url + path,
            method=method,
            data=None if body is None else body.model_dump_json().encode(),
            headers={"authorization": f"Bearer {self._token}", "content-type": "application/json"},
        )
        try:
            with _DIRECT.open(request, timeout=self._timeout_s) as response:
                return str(response.read().decode(errors="replace"))
        except urllib.error.HTTPError as error:
            raise self._answered(error) from None
        except (OSError, http.client.HTTPException) as error:
            raise ClusterUnreachable(
                f"the controller at {self._url} does not answer: {error}"
            ) from error

    def _answered(self, error: urllib.error.HTTPError) -> ClusterError:
        said = _error_text(error)
        if error.code == HTTPStatus.UNAUTHORIZED:
            return ClusterUnreachable(
                f"what answers at {self._url} does not know our token: the controller is another "
                f"bora's. `bora down` forgets it; then start anew with `bora up` or `bora deploy`"
            )
        if error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return ClusterError(f"the controller failed: {said}. `bora logs controller` shows more")
        return _Refused(said)

    def _read(self, form: type[Body], text: str) -> Body:
        try:
            return form.model_validate_json(text)
        except ValidationError:
            raise ClusterUnreachable(
                f"what answers at {self._url} is not a controller of this version of bora; "
                f"it said: {text[:200]}"
            ) from None


class _Refused(ClusterError):
    """The controller understood and said no."""

    exit_code = 2


def _error_text(error: urllib.error.HTTPError) -> str:
    try:
        text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):  # it broke off
        text = ""
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason} {text[:500]}".rstrip()
