"""What command line and controller tell each other about keys and usage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

from pydantic import Field, JsonValue

from gateway.tenants import Tenant
from gateway.usage_store import Grouping
from placement.spec import Spec


class CreateKeyRequest(Spec):
    """POST /v1/keys. `settings` are those of a `Tenant` that are given."""

    tenant: str
    settings: Mapping[str, JsonValue] = Field(default_factory=dict)


class NewKey(Spec):
    """The only time that a key is shown."""

    tenant: str
    id: str
    key: str = Field(repr=False)


class RevokeKeyRequest(Spec):
    """POST /v1/keys/revoke: a tenant's name, or a key's id."""

    name: str


class RevokedKeys(Spec):
    """The keys that are gone."""

    ids: tuple[str, ...]


class ListedKey(Spec):
    """A key in `bora keys list`."""

    id: str
    created: datetime | None


class ListedTenant(Spec):
    """A tenant in `bora keys list`: as in the key file, without hashes."""

    name: str
    weight: float
    priority: int
    models: tuple[str, ...] | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_in_flight: int | None
    budget_tokens: int | None
    budget_period: str
    expires: datetime | None
    admin: bool
    keys: tuple[ListedKey, ...]


class KeyList(Spec):
    """GET /v1/keys."""

    tenants: tuple[ListedTenant, ...]


class UsageQuery(Spec):
    """POST /v1/usage: sums from the day `since` on (empty: all), for each value of `by`."""

    since: str = ""
    by: tuple[Grouping, ...] = ("tenant",)


class UsageTotal(Spec):
    """What was used of one thing."""

    tenant: str
    model: str
    day: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    estimated_tokens: int  # of these tokens, those that the engine did not tell


class UsageTotals(Spec):
    """Its answer. Columns that are not asked for read `*`."""

    since: str
    rows: tuple[UsageTotal, ...]


def listed(tenants: Iterable[Tenant]) -> KeyList:
    """What may be shown of them."""
    return KeyList(
        tenants=tuple(
            ListedTenant(
                **tenant.model_dump(exclude={"keys"}),
                keys=tuple(ListedKey(id=key.id, created=key.created) for key in tenant.keys),
            )
            for tenant in tenants
        )
    )
