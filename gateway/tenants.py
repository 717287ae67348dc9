"""Tenants and their API keys: what a key file holds, and the ring that finds a key's tenant."""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Literal, Self

from pydantic import (
    AwareDatetime,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from placement.spec import Spec

HIGHEST_PRIORITY = 9
_PREFIX = "bora-"
_MAX_KNOWN_HEADERS = 4096


class StoredKey(Spec):
    """A key as it is kept: its hash. The key itself is shown once, when it is made."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of the whole key, in hex.")
    created: AwareDatetime | None = Field(None, description="When it was made.")

    @property
    def id(self) -> str:
        """What people call it by."""
        return self.sha256[:12]


class Tenant(Spec):
    """Who pays for requests, and what it may use. Limits that are not set do not exist."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Label in metrics and logs."
    )
    weight: PositiveFloat = Field(
        1.0, le=1000, description="Share of a busy model, relative to the others' weights."
    )
    priority: NonNegativeInt = Field(
        5, le=HIGHEST_PRIORITY, description="0 to 9; while requests wait, higher ones go first."
    )
    models: tuple[str, ...] | None = Field(
        None, description="Names or aliases that it may use; None: all."
    )
    requests_per_minute: PositiveInt | None = Field(
        None, description="Up to a minute's worth at once; None: no limit, as of what follows."
    )
    tokens_per_minute: PositiveInt | None = Field(None, description="Tokens in and out.")
    max_in_flight: PositiveInt | None = Field(None, description="Requests at a time.")
    budget_tokens: PositiveInt | None = Field(None, description="Tokens in and out per period.")
    budget_period: Literal["day", "month"] = Field("month", description="By the calendar, UTC.")
    expires: AwareDatetime | None = Field(None, description="From then on its keys are refused.")
    admin: bool = Field(False, description="May read `/metrics` and `/console`.")
    keys: tuple[StoredKey, ...] = Field((), description="Several while one is replaced.")

    @property
    def has_limits(self) -> bool:
        """Whether anything of it is counted before its requests are taken."""
        limits = (self.requests_per_minute, self.tokens_per_minute, self.max_in_flight)
        return any(limit is not None for limit in (*limits, self.budget_tokens))

    def may_use(self, names: Collection[str]) -> bool:
        """Whether it may use the model that has these names."""
        return self.models is None or any(name in self.models for name in names)


ANONYMOUS = Tenant(name="anonymous")


class KeyFile(Spec):
    """The form of `bora gateway --keys FILE`, which `bora keys` writes."""

    tenants: tuple[Tenant, ...] = Field((), description="Who may ask.")

    @model_validator(mode="after")
    def _nothing_stands_twice(self) -> Self:
        names = [tenant.name for tenant in self.tenants]
        keys = [key.id for tenant in self.tenants for key in tenant.keys]
        for what, values in (("tenant", names), ("key", keys)):
            for value, count in Counter(values).most_common(1):
                if count > 1:
                    raise ValueError(f"the {what} {value} stands twice")
        return self


class KeyTable(Spec):
    """The tenants as the controller hands them out. `version` grows with every change."""

    version: NonNegativeInt
    tenants: tuple[Tenant, ...] = ()


def new_key() -> str:
    """A key that nobody can guess: 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> str:
    """What is kept of a key. It is random enough that a plain hash cannot be searched."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


class KeyRing:
    """Finds the tenant that a key belongs to.

    Headers that were right are remembered as they were sent, so that a client's next request costs
    one dictionary look-up. Wrong ones are hashed and looked up each time, whatever is wrong.
    """

    def __init__(self, tenants: Iterable[Tenant] = ()) -> None:
        self.tenants = {tenant.name: tenant for tenant in tenants}
        self._by_digest = {
            key.sha256: tenant for tenant in self.tenants.values() for key in tenant.keys
        }
        self._by_header: dict[str, Tenant] = {}

    def find(self, header: str) -> Tenant | None:
        """The tenant of an `authorization` header, or of a bare key."""
        known = self._by_header.get(header)
        return known if known is not None else self._look_up(header)

    def _look_up(self, header: str) -> Tenant | None:
        scheme, space, rest = header.partition(" ")
        key = rest.strip() if space and scheme.lower() == "bearer" else header
        tenant = self._by_digest.get(digest_of(key))
        if tenant is not None:
            if len(self._by_header) >= _MAX_KNOWN_HEADERS:
                self._by_header.clear()
            self._by_header[header] = tenant
        return tenant


def is_expired(tenant: Tenant, now: datetime) -> bool:
    """Whether its time has passed."""
    return tenant.expires is not None and tenant.expires <= now
