"""Who is let in: keys by HTTP and gRPC, models, pages for administrators, revocation."""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anthropic
import grpc
import openai
import pytest

from gateway.access import Access
from gateway.endpoints import ServedModel
from gateway.errors import InvalidKey, StartupFailed
from gateway.proto import inference_pb2 as pb
from gateway.proto import inference_pb2_grpc
from gateway.server import run
from gateway.tenants import KeyFile, KeyRing, digest_of, new_key
from placement.errors import ConfigError
from placement.spec import load_yaml
from tests.gateway.engines import (
    CHAT,
    a_chat,
    a_client,
    a_gateway,
    a_table,
    an_endpoint,
    an_engine,
    in_flight,
    until,
)
from tests.gateway.tenants import a_key, a_locked_gateway, a_tenant, bearer, write_keys


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {a_key('acme')}"},
        {"authorization": f"bearer  {a_key('acme')} "},
        {"x-api-key": a_key("acme")},
    ],
)
async def test_a_key_lets_in_as_bearer_or_as_anthropics_header(
    tmp_path: Path, headers: dict[str, str]
) -> None:
    async with (
        an_engine() as engine,
        a_locked_gateway(tmp_path, a_table(an_endpoint(engine)), a_tenant()) as gateway,
        a_client(gateway) as client,
    ):
        for _ in range(2):
            assert (await client.post(CHAT, json=a_chat(), headers=headers)).status == 200
    assert "authorization" not in engine.seen[0].headers
    assert "x-api-key" not in engine.seen[0].headers


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer bora-wrong"},
        {"authorization": f"Basic {a_key('acme')}"},
        {"authorization": f"Bearer {a_key('acme')}x"},
        {"authorization": "Bearer \xe9"},
        {"x-api-key": "bora-wrong"},
    ],
)
async def test_without_a_valid_key_it_is_401_before_the_body_is_read(
    tmp_path: Path, headers: dict[str, str]
) -> None:
    async with (
        an_engine() as engine,
        a_locked_gateway(tmp_path, a_table(an_endpoint(engine)), a_tenant()) as gateway,
        a_client(gateway) as client,
    ):
        for body in (b"{", json.dumps(a_chat()).encode()):
            async with client.post(CHAT, data=body, headers=headers) as response:
                error = (await response.json())["error"]
                assert response.status == 401
                assert error["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"].startswith("Bearer")
                assert "wrong" not in str(error)
        for path in ("/v1/models", "/v1/models/chat", "/metrics"):
            assert (await client.get(path, headers=headers)).status == 401
        for path in ("/health", "/ready"):
            assert (await client.get(path, headers=headers)).status == 200
    assert engine.seen == []


async def test_a_key_is_only_for_its_models_and_sees_no_others(tmp_path: Path) -> None:
    tenant = a_tenant(models=("chat", "gpt"))
    async with an_engine() as engine:
        table = a_table(
            *(an_endpoint(engine, model=name) for name in ("chat", "code", "secret")),
            models=(
                ServedModel(name="chat"),
                ServedModel(name="code", aliases=("gpt",)),
                ServedModel(name="secret"),
            ),
        )
        async with (
            a_locked_gateway(tmp_path, table, tenant) as gateway,
            a_client(gateway) as client,
        ):
            for model, status in (("chat", 200), ("code", 200), ("secret", 403), ("secre", 404)):
                body = a_chat(model=model)
                async with client.post(CHAT, json=body, headers=bearer()) as response:
                    assert response.status == status
                    assert model == "secret" or "'secret'" not in await response.text()
            listed = await (await client.get("/v1/models", headers=bearer())).json()
            assert [card["id"] for card in listed["data"]] == ["chat", "code"]
            assert (await client.get("/v1/models/secret", headers=bearer())).status == 403
            assert (await client.get("/v1/models/code", headers=bearer())).status == 200


async def test_metrics_are_for_administrators(tmp_path: Path) -> None:
    tenants = (a_tenant(), a_tenant("root", admin=True))
    async with (
        a_locked_gateway(tmp_path, None, *tenants) as gateway,
        a_client(gateway) as client,
    ):
        assert (await client.get("/metrics", headers=bearer())).status == 403
        assert (await client.get("/metrics", headers=bearer("root"))).status == 200


async def test_the_clients_of_openai_and_anthropic_understand_what_they_hear(
    tmp_path: Path,
) -> None:
    async with (
        an_engine() as engine,
        a_locked_gateway(tmp_path, a_table(an_endpoint(engine)), a_tenant()) as gateway,
    ):
        base = f"http://127.0.0.1:{gateway.http_port}"
        hello = [{"role": "user", "content": "hi"}]
        async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key=a_key("acme")) as client:
            assert [model.id async for model in client.models.list()] == ["chat"]
        async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="sk-wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.chat.completions.create(model="chat", messages=hello)
        async with anthropic.AsyncAnthropic(base_url=base, api_key="sk-wrong") as client:
            with pytest.raises(anthropic.AuthenticationError):
                await client.messages.create(model="chat", messages=hello, max_tokens=5)


@pytest.mark.parametrize("name", ["authorization", "x-api-key"])
async def test_grpc_metadata_carry_keys_too(tmp_path: Path, name: str) -> None:
    value = bearer()["authorization"] if name == "authorization" else a_key("acme")
    request = pb.ChatCompletionRequest(
        model="chat", messages=[pb.ChatMessage(role="user", content="hi")]
    )
    async with (
        an_engine() as engine,
        a_locked_gateway(
            tmp_path, a_table(an_endpoint(engine)), a_tenant(models=("chat",)), grpc_port=0
        ) as gateway,
        grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        answer = await stub.ChatCompletion(request, metadata=[(name, value)])
        listed = await stub.ListModels(pb.ListModelsRequest(), metadata=[(name, value)])
        assert answer.usage.completion_tokens == 3
        assert [model.id for model in listed.data] == ["chat"]
        for ask, message in (
            (stub.ChatCompletion, request),
            (stub.ListModels, pb.ListModelsRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await ask(message, metadata=[(name, "Bearer wrong")])
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
            assert "www-authenticate" in dict(refused.value.trailing_metadata())


async def test_a_revoked_key_is_refused_soon_and_its_streams_run_on(tmp_path: Path) -> None:
    async with (
        an_engine(word_gate=asyncio.Event()) as engine,
        a_locked_gateway(
            tmp_path, a_table(an_endpoint(engine)), a_tenant(), a_tenant("other")
        ) as gateway,
        a_client(gateway) as client,
    ):
        response = await client.post(CHAT, json=a_chat(stream=True), headers=bearer())
        write_keys(tmp_path / "keys.yaml", a_tenant("other"))
        await until(lambda: "acme" not in gateway.access.ring.tenants)

        assert (await client.get("/v1/models", headers=bearer())).status == 401
        assert (await client.get("/v1/models", headers=bearer("other"))).status == 200
        engine.word_gate.set()
        assert (await response.read()).endswith(b"[DONE]\n\n")
        assert in_flight(gateway) == 0


@pytest.mark.parametrize("broken", ["tenants: [", "tenants: [{name: a, wait: 3}]", None])
async def test_a_key_file_that_is_broken_or_gone_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str | None
) -> None:
    async with (
        a_locked_gateway(tmp_path, None, a_tenant()) as gateway,
        a_client(gateway) as client,
    ):
        with caplog.at_level(logging.ERROR):
            if broken is None:
                (tmp_path / "keys.yaml").unlink()
            else:
                (tmp_path / "keys.yaml").write_text(broken)
            await until(lambda: "the old keys stay" in caplog.text)

        assert (await client.get("/health", headers=bearer())).status == 200
        assert (await client.get("/v1/models", headers=bearer())).status == 200


async def test_an_expired_key_is_refused(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    tenants = (
        a_tenant("past", expires=now - timedelta(seconds=1)),
        a_tenant("future", expires=now + timedelta(hours=1)),
    )
    async with (
        a_locked_gateway(tmp_path, None, *tenants) as gateway,
        a_client(gateway) as client,
    ):
        async with client.get("/v1/models", headers=bearer("past")) as response:
            assert response.status == 401
            assert "expired" in (await response.json())["error"]["message"]
        assert (await client.get("/v1/models", headers=bearer("future"))).status == 200


def everything_in(folder: Path) -> str:
    return b"".join(path.read_bytes() for path in folder.iterdir()).decode(errors="replace")


async def test_no_key_shows_in_logs_metrics_or_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        an_engine() as engine,
        a_locked_gateway(
            tmp_path, a_table(an_endpoint(engine)), a_tenant(admin=True), grpc_port=0
        ) as gateway,
        a_client(gateway) as client,
    ):
        with caplog.at_level(logging.DEBUG):
            for headers in (bearer(), {"x-api-key": a_key("acme")}, bearer("stranger")):
                await (await client.post(CHAT, json=a_chat(), headers=headers)).read()
        metrics = await (await client.get("/metrics", headers=bearer())).text()
        assert 'bora_gateway_tenant_requests_total{model="chat",tenant="acme"} 2.0' in metrics
        refusal = 'bora_gateway_refusals_total{reason="invalid_api_key",tenant=""} 1.0'
        assert refusal in metrics
    assert '"tenant": "acme"' in caplog.text
    for text in (caplog.text, metrics, everything_in(tmp_path), str(engine.seen)):
        assert a_key("acme") not in text
        assert a_key("stranger") not in text


async def test_with_auth_on_and_no_key_file_it_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(StartupFailed, match="auth: keys needs a key file"):
        run(endpoints=tmp_path / "endpoints.yaml", auth="keys")
    with pytest.raises(StartupFailed, match=r"keys\.yaml: no such file; make one with `bora keys"):
        async with a_gateway(auth="keys", keys_file=tmp_path / "keys.yaml"):
            pass
    with pytest.raises(StartupFailed, match="without a controller"):
        run(controller="http://x", keys=tmp_path / "keys.yaml")


async def test_with_auth_off_everybody_may_everything() -> None:
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
    ):
        for headers in ({}, {"authorization": "Bearer whatever"}):
            assert (await client.post(CHAT, json=a_chat(), headers=headers)).status == 200
            assert (await client.get("/metrics", headers=headers)).status == 200


@pytest.mark.parametrize("bad", ["", "-1", "10", "high", "5.0", "٣"])
async def test_a_priority_that_makes_no_sense_is_400(bad: str) -> None:
    async with a_gateway() as gateway, a_client(gateway) as client:
        headers = {"x-bora-priority": bad}
        async with client.post(CHAT, json=a_chat(), headers=headers) as response:
            assert response.status == 400
            assert "0 (last) to 9 (first)" in (await response.json())["error"]["message"]


def test_a_ring_remembers_headers_but_not_too_many() -> None:
    ring = KeyRing([a_tenant()])
    header = bearer()["authorization"]

    assert ring.find(header) is ring.find(header)
    for number in range(10_000):
        ring.find(f"Bearer {number}")
        ring.find(header + " " * (number % 5000))

    assert len(ring._by_header) <= 4096
    assert ring.find(header).name == "acme"


def test_keys_are_long_and_never_alike() -> None:
    keys = {new_key() for _ in range(100)}

    assert len(keys) == 100
    assert all(key.startswith("bora-") and len(key) == 48 for key in keys)
    assert len(digest_of(keys.pop())) == 64


def test_nobody_gets_in_before_the_controller_has_told_the_keys() -> None:
    access = Access(required=True)
    assert not access.is_ready

    access.apply([])

    with pytest.raises(InvalidKey):
        access.identify(bearer())


@pytest.mark.parametrize(
    ("tenants", "told"),
    [
        ("[{name: a}, {name: b}, {name: a}]", "the tenant a stands twice"),
        (
            "[{name: a, keys: [{sha256: " + "a" * 64 + "}, {sha256: " + "a" * 64 + "}]}]",
            "the key aaaaaaaaaaaa stands twice",
        ),
        ("[{name: a, budget_period: week}]", "budget_period"),
    ],
)
def test_a_key_files_mistakes_are_named(tmp_path: Path, tenants: str, told: str) -> None:
    (path := tmp_path / "keys.yaml").write_text(f"tenants: {tenants}")

    with pytest.raises(ConfigError, match=told):
        load_yaml(path, KeyFile)
