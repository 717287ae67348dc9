"""`bora keys` and `bora usage`: tenants, their API keys and what they used."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich.table import Table

from cluster import context
from cluster.cli.catalogue import Json
from cluster.cli.render import page_console
from cluster.control_api import ControlClient
from cluster.key_messages import (
    CreateKeyRequest,
    KeyList,
    ListedTenant,
    NewKey,
    RevokedKeys,
    UsageQuery,
    UsageTotals,
    listed,
)
from cluster.key_store import KeyStore
from gateway.usage_store import Grouping
from placement.errors import ConfigError

_DAYS = re.compile(r"(\d{1,5})d")
File = Annotated[
    Path | None,
    typer.Option("--file", help="Key file of a gateway alone; without: the running fleet's keys."),
]


class _Keys(Protocol):
    """Where the keys are: a file, or behind a controller."""

    def keys(self) -> KeyList: ...
    def create_key(self, request: CreateKeyRequest) -> NewKey: ...
    def revoke_key(self, name: str) -> RevokedKeys: ...
    def usage(self, query: UsageQuery) -> UsageTotals: ...


class _KeysInFile:
    """As a `ControlClient`, for a gateway that runs alone."""

    def __init__(self, path: Path) -> None:
        self._store = KeyStore(path)

    def keys(self) -> KeyList:
        return listed(self._store.tenants())

    def create_key(self, request: CreateKeyRequest) -> NewKey:
        return self._store.create(request)

    def revoke_key(self, name: str) -> RevokedKeys:
        return RevokedKeys(ids=self._store.revoke(name))

    def usage(self, query: UsageQuery) -> UsageTotals:
        return self._store.usage(query.since, query.by)


def register(app: typer.Typer) -> None:
    """Add these commands."""
    keys = typer.Typer(no_args_is_help=True, help="Tenants and their API keys.")
    keys.command("create")(create)
    keys.command("list")(list_)
    keys.command("revoke")(revoke)
    app.add_typer(keys, name="keys")
    app.command()(usage)


def create(
    name: Annotated[str, typer.Argument(help="The tenant; one that exists gets one more key.")],
    *,
    weight: Annotated[
        float | None, typer.Option(help="Share of a busy model, relative to others. [1]")
    ] = None,
    priority: Annotated[int | None, typer.Option(help="0 to 9, higher goes first. [5]")] = None,
    models: Annotated[
        str | None, typer.Option(help="Only these models, separated by commas.")
    ] = None,
    rpm: Annotated[int | None, typer.Option(help="Requests per minute.")] = None,
    tpm: Annotated[int | None, typer.Option(help="Tokens per minute, in and out.")] = None,
    max_in_flight: Annotated[int | None, typer.Option(help="Requests at a time.")] = None,
    budget_tokens: Annotated[int | None, typer.Option(help="Tokens per period.")] = None,
    period: Annotated[str | None, typer.Option(help="Of the budget: day or month.")] = None,
    expires: Annotated[
        str | None, typer.Option(help="A date, a time (ISO 8601, UTC), or days from now: 30d.")
    ] = None,
    admin: Annotated[
        bool | None, typer.Option("--admin/--no-admin", help="May read /metrics and /console.")
    ] = None,
    file: File = None,
    json_: Json = False,
) -> None:
    """Make an API key, which is shown only now. Settings that are given change the tenant's."""
    given: dict[str, Any] = {
        "weight": weight,
        "priority": priority,
        "models": [each.strip() for each in models.split(",")] if models else None,
        "requests_per_minute": rpm,
        "tokens_per_minute": tpm,
        "max_in_flight": max_in_flight,
        "budget_tokens": budget_tokens,
        "budget_period": period,
        "expires": _expiry(expires) if expires else None,
        "admin": admin,
    }
    settings = {key: value for key, value in given.items() if value is not None}
    made = _keys(file).create_key(CreateKeyRequest(tenant=name, settings=settings))
    if json_:
        print(made.model_dump_json())
        return
    print(made.key)
    page_console(stderr=True).print(
        f"key {made.id} of {made.tenant}. It is not kept and cannot be shown again", markup=False
    )


def list_(*, file: File = None, json_: Json = False) -> None:
    """All tenants with their limits and the ids of their keys."""
    found = _keys(file).keys()
    if json_:
        print(found.model_dump_json())
        return
    table = Table(
        *("tenant", "keys", "weight", "priority", "models", "requests/min", "tokens/min"),
        *("at a time", "budget", "expires", ""),
        box=None,
    )
    for tenant in found.tenants:
        table.add_row(*_row(tenant))
    page_console().print(table)


def revoke(
    name: Annotated[str, typer.Argument(help="A tenant with all its keys, or the id of one key.")],
    *,
    file: File = None,
    json_: Json = False,
) -> None:
    """Take keys away, within about a second. Streams that run may finish."""
    gone = _keys(file).revoke_key(name)
    if json_:
        print(gone.model_dump_json())
    else:
        page_console(stderr=True).print(f"revoked: {', '.join(gone.ids) or name}", markup=False)


def usage(
    *,
    since: Annotated[
        str, typer.Option(help="A date (UTC), or days ago: 7d. Without: all that is kept.")
    ] = "",
    by: Annotated[
        list[str] | None, typer.Option(help="tenant, model or day; may be given several times.")
    ] = None,
    file: File = None,
    json_: Json = False,
) -> None:
    """Requests and tokens, per tenant or as asked for."""
    columns = [_grouping(name) for name in by or ["tenant"]]
    query = UsageQuery(since=_first_day(since) if since else "", by=tuple(columns))
    totals = _keys(file).usage(query)
    if json_:
        print(totals.model_dump_json())
        return
    table = Table(*columns, "requests", "tokens in", "tokens out", "estimated", box=None)
    for row in totals.rows:
        counts = (row.requests, row.prompt_tokens, row.completion_tokens, row.estimated_tokens)
        names = [str(getattr(row, column)) for column in columns]
        table.add_row(*names, *(f"{count:,}" for count in counts))
    page_console().print(table)


def _keys(file: Path | None) -> _Keys:
    if file is not None:
        return _KeysInFile(file)
    running = context.require()
    return ControlClient(running.controller_url, running.token)


def _row(tenant: ListedTenant) -> list[str]:
    def text(value: object) -> str:
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    budget = tenant.budget_tokens
    return [
        tenant.name,
        ", ".join(key.id for key in tenant.keys),
        f"{tenant.weight:g}",
        str(tenant.priority),
        "all" if tenant.models is None else ", ".join(tenant.models),
        text(tenant.requests_per_minute),
        text(tenant.tokens_per_minute),
        text(tenant.max_in_flight),
        "-" if budget is None else f"{budget:,} a {tenant.budget_period}",
        "-" if tenant.expires is None else f"{tenant.expires:%Y-%m-%d %H:%M}",
        "admin" if tenant.admin else "",
    ]


def _grouping(name: str) -> Grouping:
    match name:
        case "tenant" | "model" | "day":
            return name
        case _:
            raise ConfigError(f"--by {name!r}: expected tenant, model or day")


def _expiry(given: str) -> str:
    if found := _DAYS.fullmatch(given):
        return (datetime.now(UTC) + timedelta(days=int(found[1]))).isoformat(timespec="seconds")
    try:
        time = datetime.fromisoformat(given)
    except ValueError:
        raise ConfigError(
            f"--expires {given!r}: expected a date such as 2027-01-31, a time such as"
            f" 2027-01-31T12:00:00+00:00, or days from now such as 30d"
        ) from None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).isoformat()


def _first_day(given: str) -> str:
    if found := _DAYS.fullmatch(given):
        return (datetime.now(UTC).date() - timedelta(days=int(found[1]))).isoformat()
    try:
        return date.fromisoformat(given).isoformat()
    except ValueError:
        raise ConfigError(
            f"--since {given!r}: expected a date such as 2026-11-01, or days ago such as 7d"
        ) from None
