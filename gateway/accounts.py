"""Accounts: what each tenant has taken of its limits. One turn at the counter per request.

enter -> Visit -> leave        reserved before an engine is asked, settled with what it used
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from gateway.call import Call
from gateway.errors import QuotaSpent, RateLimited
from gateway.ledger import Ledger, period_end_s, period_of
from gateway.prediction import RunningMean, generates, prompt_tokens
from gateway.record import Record
from gateway.shared_cells import NUM_CELLS, SharedCells
from gateway.tenants import Tenant
from gateway.token_bucket import Cells, TokenBucket
from gateway.usage import Usage

_REQUESTS, _TOKENS, _IN_FLIGHT, _RESERVED = 0, 2, 4, 5  # cells; a bucket has two
_FIRST_WAIT_S = 1.0  # for what may end at any time
_UNLOCKED: AbstractContextManager[object] = nullcontext()


@dataclass(slots=True)
class Visit:
    """A request that an account has let in. `reserved` are the tokens set aside for it."""

    account: Account
    tenant: Tenant
    model: str
    call: Call
    reserved: int = 0
    left: bool = False


class Account:
    """What one tenant has taken. It outlives changes of the tenant's settings.

    `cells` are its own or those of all workers, which `lock` then guards.
    """

    __slots__ = (
        *("_cells", "_lock", "_period", "_requests", "_tenant", "_tokens", "_unflushed"),
        *("_flushing", "_is_shared", "_page_ends", "_spent", "has_limits"),
    )

    def __init__(
        self, tenant: Tenant, cells: Cells, lock: AbstractContextManager[object] = _UNLOCKED
    ) -> None:
        self._cells, self._lock = cells, lock
        self._is_shared = lock is not _UNLOCKED
        self._period = ""
        self._page_ends = 0.0  # seconds since the epoch; no period ends before
        self.has_limits = True
        self._spent = self._unflushed = self._flushing = 0
        self._tenant = tenant
        self._requests: TokenBucket | None = None
        self._tokens: TokenBucket | None = None
        self.adopt(tenant)

    def adopt(self, tenant: Tenant) -> None:
        """Go by the tenant's new settings; what was taken stays taken."""
        rpm, tpm = tenant.requests_per_minute, tenant.tokens_per_minute
        self._requests = TokenBucket(rpm, self._cells, _REQUESTS) if rpm else None
        self._tokens = TokenBucket(tpm, self._cells, _TOKENS) if tpm else None
        self._tenant = tenant
        self._page_ends = 0.0
        self.has_limits = tenant.has_limits

    @property
    def in_flight(self) -> int:
        """Requests that have entered and not left, of all workers."""
        return int(self._cells[_IN_FLIGHT])

    @property
    def reserved(self) -> int:
        """Tokens set aside for them."""
        return int(self._cells[_RESERVED])

    def enter(self, tokens: int, now: float, wall: float) -> None:
        """Take a request that is predicted to use `tokens`, or none of it.

        Raises:
            RateLimited: a limit per minute, or of requests at a time, is reached.
            QuotaSpent: the budget of this day or month is.
        """
        if self._is_shared:
            with self._lock:
                self._take(tokens, now, wall)
        else:
            self._take(tokens, now, wall)

    def _take(self, tokens: int, now: float, wall: float) -> None:
        tenant, cells = self._tenant, self._cells
        if tenant.budget_tokens is not None:
            self._turn_page(wall)
            if self._spent + self._unflushed + cells[_RESERVED] >= tenant.budget_tokens:
                raise QuotaSpent(
                    f"{tenant.name} has used its {tenant.budget_tokens} tokens of this"
                    f" {tenant.budget_period}",
                    retry_after_s=self._quota_wait_s(wall),
                )
        most = tenant.max_in_flight
        if most is not None and cells[_IN_FLIGHT] >= most:
            raise self._limited(f"{most} requests at a time", _FIRST_WAIT_S, now, tokens)
        if self._requests and not self._requests.take(1, now):
            raise self._bucket_empty(self._requests, "requests", 1, now, tokens)
        if self._tokens and not self._tokens.take(tokens, now):
            if self._requests:
                self._requests.correct(-1, now)
            raise self._bucket_empty(self._tokens, "tokens", tokens, now, tokens)
        cells[_IN_FLIGHT] += 1
        cells[_RESERVED] += tokens

    def leave(self, reserved: int, used: int, now: float, wall: float) -> None:
        """Settle what `enter` took: the request used `used` tokens."""
        if self._is_shared:
            with self._lock:
                self._settle(reserved, used, now)
        else:
            self._settle(reserved, used, now)
        self._turn_page(wall)
        self._unflushed += used

    def _settle(self, reserved: int, used: int, now: float) -> None:
        cells = self._cells
        if self._tokens and used != reserved:
            self._tokens.correct(used - reserved, now)
        cells[_IN_FLIGHT] -= 1
        cells[_RESERVED] -= reserved

    def flushing(self) -> None:
        """What was used until now is being written to the store."""
        self._flushing = self._unflushed

    def flushed(self, spent: int, period: str) -> None:
        """It is written, and the store now says `spent` for `period`, of all gateways together."""
        self._unflushed = max(0, self._unflushed - self._flushing)
        self._flushing = 0
        if period >= self._period:
            self._spent, self._period = spent, period

    def _turn_page(self, wall: float) -> None:
        if wall < self._page_ends:
            return
        self._page_ends = period_end_s(wall, "day")
        period = period_of(wall, self._tenant.budget_period)
        if period != self._period:
            self._period = period
            self._spent = self._unflushed = self._flushing = 0

    def _bucket_empty(
        self, bucket: TokenBucket, what: str, amount: float, now: float, tokens: int
    ) -> RateLimited:
        limit = f"{bucket.capacity:g} {what} per minute"
        return self._limited(limit, bucket.wait_s(amount, now), now, tokens)

    def _quota_wait_s(self, wall: float) -> float:
        """Until the period ends; what is only reserved may come back sooner."""
        if self._spent + self._unflushed < (self._tenant.budget_tokens or 0):
            return _FIRST_WAIT_S
        return period_end_s(wall, self._tenant.budget_period) - wall

    def _limited(self, limit: str, wait_s: float, now: float, tokens: int) -> RateLimited:
        headers = {}
        for bucket, what in ((self._requests, "requests"), (self._tokens, "tokens")):
            if bucket:
                headers[f"x-ratelimit-limit-{what}"] = f"{bucket.capacity:g}"
                headers[f"x-ratelimit-remaining-{what}"] = str(max(0, int(bucket.level(now))))
                headers[f"x-ratelimit-reset-{what}"] = f"{bucket.full_in_s(now):.3f}s"
        return RateLimited(
            f"{self._tenant.name} has reached its limit of {limit}; this request is predicted to"
            f" take {tokens} tokens",
            retry_after_s=wait_s,
            headers=headers,
        )


class Accounts:
    """The accounts of all tenants, and the ledger of what they used."""

    def __init__(
        self,
        *,
        shared: SharedCells | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.ledger = Ledger(wall_clock)
        self._shared = shared
        self._clock, self._wall_clock = clock, wall_clock
        self._accounts: dict[str, Account] = {}
        self._means: dict[str, RunningMean] = {}

    def apply(self, tenants: Iterable[Tenant]) -> None:
        """Go by these tenants. One that is gone keeps its account while it has requests."""
        current = {tenant.name: tenant for tenant in tenants}
        for name, account in list(self._accounts.items()):
            if name not in current and not account.in_flight:
                del self._accounts[name]
        for name, tenant in current.items():
            if name in self._accounts:
                self._accounts[name].adopt(tenant)
            elif tenant.budget_tokens is not None:  # so that it can be told what was spent before
                self._accounts[name] = self._new_account(tenant)

    def enter(self, tenant: Tenant, model: str, call: Call, context: int | None = None) -> Visit:
        """Let a request in. `leave` must follow, once. `context` are the model's tokens, if known.

        Raises:
            RateLimited: a limit is reached.
            QuotaSpent: the budget is.
        """
        account = self._accounts.get(tenant.name)
        if account is None:
            account = self._accounts[tenant.name] = self._new_account(tenant)
        reserved = 0
        if account.has_limits:
            reserved = self.predicted(call, model)
            if context is not None and context < reserved:
                reserved = context
        account.enter(reserved, self._clock(), self._wall_clock())
        return Visit(account, tenant, model, call, reserved)

    def leave(self, visit: Visit, record: Record) -> None:
        """The request is over: count what it used. A second call does nothing."""
        if visit.left:
            return
        visit.left = True
        usage, estimated = record.usage, False
        if usage is None:
            usage = self._guessed(visit.call, record)
            estimated = bool(usage.completion_tokens)
        elif generates(visit.call.path):
            self._mean(record.model).add(usage.completion_tokens)
        used = usage.prompt_tokens + usage.completion_tokens
        visit.account.leave(visit.reserved, used, self._clock(), self._wall_clock())
        if record.status < 400 or used:
            self.ledger.add(visit.tenant.name, record.model, usage, estimated=estimated)

    def predicted(self, call: Call, model: str) -> int:
        """Tokens in and out that a request will take."""
        tokens = prompt_tokens(call.body)
        if generates(call.path):
            most = call.max_tokens
            tokens += int(self._mean(model).value) if most is None else most
        return tokens

    def flushing(self) -> None:
        """The ledger's rows are being written to the store."""
        for account in self._accounts.values():
            account.flushing()

    def flushed(self, spent: Mapping[str, tuple[str, int]]) -> None:
        """They are written; `spent` has each tenant's period and tokens, of all gateways."""
        for name, (period, tokens) in spent.items():
            account = self._accounts.get(name)
            if account:
                account.flushed(tokens, period)
        for name in self._accounts.keys() - spent.keys():
            self._accounts[name].flushed(0, "")

    def _guessed(self, call: Call, record: Record) -> Usage:
        """What was used, where the engine did not say: what went in and the chunks that came out."""
        if not record.answer_chunks or not generates(call.path):
            return Usage(0, 0)
        return Usage(prompt_tokens(call.body), record.answer_chunks)

    def _mean(self, model: str) -> RunningMean:
        mean = self._means.get(model)
        if mean is None:
            mean = self._means[model] = RunningMean()
        return mean

    def _new_account(self, tenant: Tenant) -> Account:
        if self._shared is None:
            return Account(tenant, [0.0] * NUM_CELLS)
        return Account(tenant, self._shared.cells(tenant.name), self._shared.lock)
