"""What every request to the simulated engine passes: errors in OpenAI's form, the key, the fault."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from cluster.engines.sim_api import RequestRefused, error_body
from cluster.engines.sim_drill import PATH as DRILL_PATH
from cluster.engines.sim_drill import Drill

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every refusal has an OpenAI error body."""
    try:
        return await handler(request)
    except RequestRefused as error:
        return web.json_response(error.body, status=error.status)
    except web.HTTPException as error:  # aiohttp's own: no such path, body too large
        what = f"{request.method} {request.path}: {error.reason}"
        return web.json_response(error_body(what, error.status), status=error.status)
    except web.RequestPayloadError as error:  # a body not encoded as its header says
        refused = RequestRefused(f"There was an error parsing the body: {error}")
        return web.json_response(refused.body, status=refused.status)


def authentication(key: str) -> Middleware:
    """`/v1` asks for `key`, as in vLLM; an empty one opens it."""

    @web.middleware
    async def authenticated(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        if key and request.path.startswith("/v1") and given != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    return authenticated


def faults(drill: Drill) -> Middleware:
    """The fault that is on strikes before the handler, but not who sets it."""

    @web.middleware
    async def struck(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path != DRILL_PATH:
            await drill.before_head(request, generates=request.method == "POST")
        return await handler(request)

    return struck
