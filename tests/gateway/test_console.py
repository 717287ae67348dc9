from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re

from gateway.endpoints import ServedModel
from tests.gateway.engines import (
    CHAT,
    a_chat,
    a_client,
    a_gateway,
    a_table,
    an_endpoint,
    an_engine,
    until,
)

EVIL = '</script><img src=x onerror="alert(1)">\\"\n'


async def test_the_page_may_run_its_own_script_and_style_and_nothing_else() -> None:
    async with a_gateway(a_table()) as gateway, a_client(gateway) as client:
        response = await client.get("/console")
        page = await response.text()

    assert response.status == 200
    assert response.content_type == "text/html"
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = dict(
        part.strip().split(" ", 1)
        for part in response.headers["content-security-policy"].split(";")
    )
    for element, directive in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy.pop(directive) == f"'sha256-{digest}'"
    assert policy.pop("connect-src") == "'self'"
    assert set(policy) == {"default-src", "base-uri", "form-action", "frame-ancestors"}
    assert set(policy.values()) == {"'none'"}


async def test_the_page_loads_nothing_and_never_takes_text_for_markup() -> None:
    async with a_gateway(a_table()) as gateway, a_client(gateway) as client:
        page = await (await client.get("/console")).text()

    without_namespace = page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"\b(src|href|url)\s*[=(]|@import|https?://\w", without_namespace)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", page
    )
    assert not re.search(r"\son\w+=|\sstyle=", page)  # the policy forbids them


async def test_the_data_tells_models_endpoints_and_what_they_did() -> None:
    async with an_engine() as engine:
        table = a_table(
            an_endpoint(engine, variant="v", max_in_flight=4),
            an_endpoint("http://user:pass@127.0.0.1:9", id="gone", state="draining"),
            models=(
                ServedModel(name="chat", aliases=("c",)),
                ServedModel(name="asleep"),
            ),
            version=7,
        )
        async with a_gateway(table) as gateway, a_client(gateway) as client:
            for stream in (True, False):
                await (await client.post(CHAT, json=a_chat(stream=stream))).read()
            await client.post(CHAT, json=a_chat(model="nope"))
            await asyncio.sleep(0)
            response = await client.get("/console/data")
            data = json.loads(await response.read())

    assert response.content_type == "application/json"
    assert (data["ready"], data["workers"], data["table_version"]) == (True, 1, 7)
    assert data["uptime_s"] >= 0
    chat, asleep = data["models"]
    assert (chat["name"], chat["aliases"], chat["ready"], chat["total"]) == ("chat", ["c"], 1, 2)
    assert (asleep["ready"], asleep["total"], asleep["ttft"]) == (0, 0, None)
    assert chat["statuses"] == {"200": 2}
    assert data["unrouted"] == {"404": 1}
    assert (chat["in_flight"], chat["queued"], chat["retries"], chat["migrations"]) == (0, 0, 0, 0)
    assert chat["completion_tokens"] >= 3
    assert len(chat["ttft"]["counts"]) == len(chat["ttft"]["bounds_s"]) + 1
    assert chat["ttft"]["counts"][-1] == 1
    here, gone = data["endpoints"]
    assert here == {
        "model": "chat",
        "variant": "v",
        "key": engine.url,
        "url": engine.url,
        "state": "ready",
        "breaker": "closed",
        "in_flight": 0,
        "max_in_flight": 4,
        "requests": 2,
    }
    assert (gone["key"], gone["state"], gone["url"]) == ("gone", "draining", "http://127.0.0.1:9")
    assert "pass" not in json.dumps(data)


async def test_what_runs_and_what_waits_is_told() -> None:
    async with (
        an_engine(gate=asyncio.Event()) as engine,
        a_gateway(a_table(an_endpoint(engine, max_in_flight=1))) as gateway,
        a_client(gateway) as client,
    ):
        asked = [asyncio.ensure_future(client.post(CHAT, json=a_chat())) for _ in range(3)]
        await until(lambda: gateway.admission.queued("chat") == 2)
        data = await (await client.get("/console/data")).json()
        engine.gate.set()
        await asyncio.gather(*asked)

    assert (data["models"][0]["in_flight"], data["models"][0]["queued"]) == (1, 2)
    assert (data["endpoints"][0]["in_flight"], data["endpoints"][0]["max_in_flight"]) == (1, 1)


async def test_names_that_are_markup_arrive_as_text_with_their_figures() -> None:
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine, model=EVIL, variant=EVIL, id=EVIL))) as gateway,
        a_client(gateway) as client,
    ):
        await (await client.post(CHAT, json=a_chat(model=EVIL))).read()
        response = await client.get("/console/data")
        data = await response.json()
        page = await (await client.get("/console")).text()

    assert response.content_type == "application/json"
    assert data["models"][0]["name"] == EVIL
    assert data["models"][0]["statuses"] == {"200": 1}
    assert (data["endpoints"][0]["key"], data["endpoints"][0]["variant"]) == (EVIL, EVIL)
    assert "onerror" not in page


async def test_before_there_is_a_table_there_is_a_page_and_nothing_in_it() -> None:
    async with (
        a_gateway(controller_url="http://127.0.0.1:9") as gateway,
        a_client(gateway) as client,
    ):
        data = await (await client.get("/console/data")).json()

    assert (data["ready"], data["table_version"], data["models"]) == (False, None, [])
