"""Keys and usage: the files, the command line, and the way through controller and gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.control_api import ControlClient, serve_control_api
from cluster.errors import ClusterError
from cluster.key_messages import CreateKeyRequest, UsageQuery
from cluster.key_store import KeyStore
from cluster.processes import free_ports
from cluster.sync_desk import SyncDesk
from gateway.endpoints import EndpointTable, SyncRequest
from gateway.ledger import UsageReport, UsageRow
from gateway.tenants import KeyRing, digest_of
from placement.errors import ConfigError, UnknownName
from tests.cluster.test_control_api import RememberingControl
from tests.gateway.engines import (
    CHAT,
    PATIENCE_S,
    a_chat,
    a_client,
    a_gateway,
    a_table,
    an_endpoint,
    an_engine,
    until,
)

TOKEN = "the-token"


def a_request(tenant: str = "acme", **settings: object) -> CreateKeyRequest:
    return CreateKeyRequest(tenant=tenant, settings=settings)


def test_a_key_is_made_found_and_taken_away(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.yaml")
    made = store.create(a_request(weight=2, models=["chat"], expires="2030-01-01T00:00:00Z"))
    store.create(a_request("other"))

    tenant = KeyRing(store.tenants()).find(f"Bearer {made.key}")

    assert (tenant.name, tenant.weight, tenant.models) == ("acme", 2, ("chat",))
    assert tenant.expires == datetime(2030, 1, 1, tzinfo=UTC)
    assert made.id == digest_of(made.key)[:12]
    text = store.path.read_text()
    assert made.key not in text
    assert store.path.stat().st_mode & 0o777 == 0o600
    assert store.revoke("acme") == (made.id,)
    assert [each.name for each in store.tenants()] == ["other"]


def test_one_more_key_of_a_tenant_replaces_the_old_one_in_peace(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.yaml")
    old = store.create(a_request(weight=2, priority=3))
    new = store.create(a_request(priority=7))

    [tenant] = store.tenants()
    assert (tenant.weight, tenant.priority) == (2, 7)
    assert [key.id for key in tenant.keys] == [old.id, new.id]
    assert store.revoke(old.id) == (old.id,)
    [tenant] = store.tenants()
    assert [key.id for key in tenant.keys] == [new.id]


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (a_request("a b"), "name: String should match"),
        (a_request(weight=0), "weight: Input should be greater than 0"),
        (a_request(wait=3), "wait: Extra inputs"),
        (a_request(priority=10), "priority"),
        (a_request(budget_period="week"), "budget_period"),
    ],
)
def test_settings_that_make_no_sense_change_nothing(
    tmp_path: Path, request_: CreateKeyRequest, told: str
) -> None:
    store = KeyStore(tmp_path / "keys.yaml")

    with pytest.raises(ConfigError, match=told):
        store.create(request_)

    assert store.tenants() == ()


def test_who_is_unknown_cannot_be_revoked_and_bad_files_are_told(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.yaml")
    store.create(a_request())
    with pytest.raises(UnknownName, match="did you mean 'acme'"):
        store.revoke("acne")

    (tmp_path / "keys.usage.sqlite").write_text("this is no database")
    with pytest.raises(ConfigError, match=r"keys\.usage\.sqlite.*not a database"):
        store.usage("", ["tenant"])
    with pytest.raises(ConfigError, match=r"keys\.yaml: No such file"):
        KeyStore(tmp_path / "nowhere" / "keys.yaml").create(a_request())


def bora(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    return result.exit_code, result.stdout


def test_the_command_line_makes_lists_and_revokes(tmp_path: Path) -> None:
    file = ("--file", str(tmp_path / "keys.yaml"))
    options = ("--weight", "2", "--priority", "7", "--models", "chat, code", "--rpm", "60")
    options += ("--tpm", "9000", "--max-in-flight", "4", "--budget-tokens", "1000000")
    options += ("--period", "day", "--expires", "30d", "--admin")
    code, text = bora("keys", "create", "acme", *options, *file)
    key = text.strip()
    assert code == 0
    assert key.startswith("bora-")

    made = json.loads(bora("keys", "create", "other", "--json", *file)[1])
    assert set(made) == {"tenant", "id", "key"}

    acme, other = json.loads(bora("keys", "list", "--json", *file)[1])["tenants"]
    assert acme["models"] == ["chat", "code"]
    assert (acme["requests_per_minute"], acme["tokens_per_minute"]) == (60, 9000)
    assert (acme["budget_tokens"], acme["budget_period"]) == (1_000_000, "day")
    assert (acme["max_in_flight"], acme["admin"]) == (4, True)
    expires = datetime.fromisoformat(acme["expires"])
    assert timedelta(days=29) < expires - datetime.now(UTC) < timedelta(days=31)
    assert other["keys"][0]["id"] == made["id"]
    page = bora("keys", "list", *file)[1]
    assert "1,000,000 a day" in page
    assert key not in page

    assert json.loads(bora("keys", "revoke", made["id"], "--json", *file)[1])["ids"] == [made["id"]]
    assert bora("keys", "revoke", "acme", *file)[0] == 0


def test_usage_is_shown_by_what_was_asked_for(tmp_path: Path) -> None:
    file = ("--file", str(tmp_path / "keys.yaml"))
    store = KeyStore(tmp_path / "keys.yaml")
    store.prepare_usage()
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    rows = tuple(
        UsageRow(tenant="acme", model=model, day=day, requests=1, prompt_tokens=1500)
        for model in ("chat", "code")
    )
    store.add_usage(UsageReport(source="a-gateway", sequence=1, rows=rows))

    found = json.loads(bora("usage", "--by", "model", "--since", "7d", "--json", *file)[1])
    assert [(row["tenant"], row["model"], row["prompt_tokens"]) for row in found["rows"]] == [
        ("*", "chat", 1500),
        ("*", "code", 1500),
    ]
    assert "3,000" in bora("usage", *file)[1]
    assert json.loads(bora("usage", "--since", "2099-01-01", "--json", *file)[1])["rows"] == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("usage", "--since", "yesterday"), "--since 'yesterday': expected a date"),
        (("usage", "--by", "weekday"), "--by 'weekday': expected tenant, model or day"),
        (("keys", "create", "a", "--expires", "soon"), "--expires 'soon': expected a date"),
    ],
)
def test_what_cannot_be_meant_is_told(
    tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        bora(*arguments, "--file", str(tmp_path / "keys.yaml"))


@asynccontextmanager
async def a_controller(
    folder: Path, table: EndpointTable | None = None
) -> AsyncIterator[tuple[SyncDesk, ControlClient, str]]:
    """Its desk, behind its HTTP API, without the Ray that the rest of it acts on."""
    [port] = free_ports(1)
    desk = SyncDesk(folder, lambda: False)
    if table:
        desk.publish(table, changed_s=1.0)
    control = RememberingControl(folder)
    control.keys, control.sync = desk.keys, desk.answer
    runner = await serve_control_api(control, "127.0.0.1", port, TOKEN)
    url = f"http://127.0.0.1:{port}"
    try:
        yield desk, ControlClient(url, TOKEN), url
    finally:
        await runner.cleanup()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_keys_and_usage_make_the_round_through_controller_and_gateway(
    tmp_path: Path,
) -> None:
    async with (
        an_engine() as engine,
        a_controller(tmp_path, a_table(an_endpoint(engine), version=7)) as (_, keys, url),
        a_gateway(controller_url=url, controller_token=TOKEN, auth="keys") as gateway,
        a_client(gateway) as client,
    ):
        await until(lambda: gateway.is_ready)
        assert (await client.post(CHAT, json=a_chat())).status == 401
        made = await asyncio.to_thread(keys.create_key, a_request(budget_tokens=15))
        await until(lambda: "acme" in gateway.access.ring.tenants)

        for status in (200, 200, 429):  # an answer is 10 tokens
            response = await client.post(CHAT, json=a_chat(), headers=bearer(made.key))
            assert response.status == status

        async def used() -> int:
            return sum(row.requests for row in (await asyncio.to_thread(keys.usage, query)).rows)

        query = UsageQuery(by=("tenant", "model"))
        async with asyncio.timeout(PATIENCE_S):
            while await used() < 2:
                await asyncio.sleep(0.05)
        [row] = (await asyncio.to_thread(keys.usage, query)).rows
        assert (row.tenant, row.model, row.requests) == ("acme", "chat", 2)
        assert (row.prompt_tokens, row.completion_tokens) == (14, 6)

        async with (  # a second gateway holds the same budget
            a_gateway(controller_url=url, controller_token=TOKEN, auth="keys") as second,
            a_client(second) as to_second,
        ):
            await until(lambda: second.is_ready)
            response = await to_second.post(CHAT, json=a_chat(), headers=bearer(made.key))
            assert response.status == 429

        assert (await asyncio.to_thread(keys.revoke_key, "acme")).ids == (made.id,)
        await until(lambda: "acme" not in gateway.access.ring.tenants)
        refused = await client.post(CHAT, json=a_chat(), headers=bearer(made.key))
        assert refused.status == 401
        assert (await asyncio.to_thread(keys.keys)).tenants == ()
        with pytest.raises(ClusterError, match="unknown tenant or key 'acme'"):
            await asyncio.to_thread(keys.revoke_key, "acme")


async def test_usage_that_was_not_told_yet_is_told_at_the_end(tmp_path: Path) -> None:
    async with (
        an_engine() as engine,
        a_controller(tmp_path, a_table(an_endpoint(engine), version=7)) as (_, keys, url),
    ):
        made = await asyncio.to_thread(keys.create_key, a_request())
        async with (
            a_gateway(controller_url=url, controller_token=TOKEN, auth="keys") as gateway,
            a_client(gateway) as client,
        ):
            await until(lambda: gateway.is_ready)
            response = await client.post(CHAT, json=a_chat(), headers=bearer(made.key))
            assert response.status == 200

        [row] = (await asyncio.to_thread(keys.usage, UsageQuery())).rows
        assert row.requests == 1


async def test_a_report_that_is_repeated_counts_once_and_who_has_no_auth_hears_nothing(
    tmp_path: Path,
) -> None:
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    row = UsageRow(tenant="acme", model="chat", day=day, requests=1, prompt_tokens=5)
    report = UsageReport(source="a-gateway", sequence=3, rows=(row,))
    request = SyncRequest(gateway="g", version=0, wait_s=0, wants_keys=True, usage=report)
    async with a_controller(tmp_path) as (desk, keys, _):
        await asyncio.to_thread(keys.create_key, a_request(budget_tokens=100))
        first = await desk.answer(request)
        again = await desk.answer(request)
        plain = await desk.answer(SyncRequest(gateway="h", version=0, wait_s=0))

        assert first.usage_sequence == again.usage_sequence == 3
        assert [tenant.name for tenant in first.keys.tenants] == ["acme"]
        [total] = (await asyncio.to_thread(keys.usage, UsageQuery())).rows
        assert total.requests == 1
        assert (plain.keys, plain.spent) == (None, {})
        known = request.model_copy(update={"keys_version": first.keys.version, "usage": None})
        assert (await desk.answer(known)).keys is None

    async with a_controller(tmp_path) as (desk, _, _):  # after a restart
        assert (await desk.answer(request)).usage_sequence == 3
        assert (await desk.answer(request)).spent["acme"].tokens == 5
    assert (tmp_path / "keys.yaml").stat().st_mode & 0o777 == 0o600
