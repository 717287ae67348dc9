"""What a gateway tells the controller about its tenants' usage, so that each report counts once."""

from __future__ import annotations

import secrets

from gateway.accounts import Accounts
from gateway.endpoints import SyncResponse
from gateway.ledger import UsageReport


class UsageReports:
    """Repeats a report until the controller has confirmed it; what comes meanwhile is the next."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._source = secrets.token_hex(16)
        self._sequence = 0
        self._unconfirmed: UsageReport | None = None

    def next(self) -> UsageReport | None:
        """The report to send now; None: there is nothing to tell."""
        if self._unconfirmed is None:
            self._accounts.flushing()
            if rows := self._accounts.ledger.take():
                self._sequence += 1
                self._unconfirmed = UsageReport(
                    source=self._source, sequence=self._sequence, rows=rows
                )
        return self._unconfirmed

    def answered(self, response: SyncResponse) -> None:
        """The controller has answered a request that held the report."""
        if self._unconfirmed is not None:
            if response.usage_sequence != self._unconfirmed.sequence:
                return  # it does not keep usage, or could not: tell it again
            self._unconfirmed = None
        spent = {name: (each.period, each.tokens) for name, each in response.spent.items()}
        self._accounts.flushed(spent)
