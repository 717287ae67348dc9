"""Access: who asks, what it may ask for, and what it has used. The faces' one entry to tenants."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime

from gateway.accounts import Accounts, Visit
from gateway.bodies import ModelCard
from gateway.call import Call
from gateway.endpoints import ServedModel
from gateway.errors import InvalidKey, NotAllowed, Unavailable
from gateway.record import Record
from gateway.tenants import ANONYMOUS, KeyRing, Tenant, is_expired

_ADMIN_PATHS = ("/metrics", "/console/data")


class Access:
    """Without `required`, everybody is `ANONYMOUS` and nothing is counted."""

    def __init__(
        self,
        *,
        required: bool = False,
        accounts: Accounts | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.required = required
        self.ring: KeyRing | None = None
        self.accounts = accounts or Accounts()
        self._wall_clock = wall_clock

    @property
    def is_ready(self) -> bool:
        """It knows whom to let in."""
        return not self.required or self.ring is not None

    def apply(self, tenants: Iterable[Tenant]) -> None:
        """From now on these have access. Requests that were let in go on."""
        self.ring = KeyRing(tenants)
        self.accounts.apply(self.ring.tenants.values())

    def identify(self, headers: Mapping[str, str]) -> Tenant:
        """Whose key `authorization` or `x-api-key` holds. `headers` have lower-case names.

        Raises:
            InvalidKey: there is none, or it is unknown, revoked or expired.
            Unavailable: no keys have come from the controller yet.
        """
        if not self.required:
            return ANONYMOUS
        if self.ring is None:
            raise Unavailable("the gateway has no keys yet", retry_after_s=1)
        given = headers.get("authorization") or headers.get("x-api-key")
        if not given:
            raise InvalidKey(
                "no API key: send `authorization: Bearer KEY` or `x-api-key: KEY`; an"
                " administrator makes keys with `bora keys create`"
            )
        tenant = self.ring.find(given)
        if tenant is None:
            raise InvalidKey("the API key is not valid, or was revoked")
        if tenant.expires is not None and is_expired(
            tenant, datetime.fromtimestamp(self._wall_clock(), UTC)
        ):
            raise InvalidKey("the API key has expired")
        return tenant

    def admit_to(self, path: str, headers: Mapping[str, str]) -> Tenant:
        """As `identify`, for a page of the gateway's own. Health and the bare console are for all.

        Raises:
            NotAllowed: the page is for administrators' keys.
        """
        if not self.required or path in {"/health", "/ready", "/console"}:
            return ANONYMOUS
        tenant = self.identify(headers)
        if path.startswith(_ADMIN_PATHS) and not tenant.admin:
            raise NotAllowed(f"{path[:200]} needs the key of an administrator")
        return tenant

    def enter(self, call: Call, model: ServedModel) -> Visit | None:
        """Let a call in; None: nothing is counted. `leave` must follow.

        Raises:
            NotAllowed: the key is not for this model.
            RateLimited: a limit of the tenant is reached.
            QuotaSpent: its budget is.
        """
        tenant = call.tenant
        if tenant is ANONYMOUS:
            return None
        require_use(tenant, model)
        return self.accounts.enter(tenant, model.name, call, model.max_model_len)

    def leave(self, visit: Visit | None, record: Record) -> None:
        """The call is over."""
        if visit is not None:
            self.accounts.leave(visit, record)


def may_use(tenant: Tenant, model: ServedModel) -> bool:
    """Whether `tenant` may use `model`, under whatever name."""
    return tenant.models is None or tenant.may_use((model.name, *model.aliases))


def require_use(tenant: Tenant, model: ServedModel) -> None:
    """Raise `NotAllowed` unless `tenant` may use `model`."""
    if not may_use(tenant, model):
        raise NotAllowed(
            f"the key of {tenant.name} is not for the model {model.name!r}", param="model"
        )


def visible(cards: Iterable[ModelCard], tenant: Tenant) -> list[ModelCard]:
    """Those of `/v1/models` that `tenant` may use."""
    return [card for card in cards if tenant.may_use((card["id"], *card["aliases"]))]
