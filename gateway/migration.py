"""Migration: a stream that goes on at another engine, as often as engines fail."""

from __future__ import annotations

from gateway.call import Call, parse_object
from gateway.continuation import CannotContinue, Splice, check, continuation, goes_by_ids
from gateway.errors import BadRequest
from gateway.lenient_json import json_bytes
from gateway.relay import Relay
from gateway.transcript import Again


class Migration:
    """Of the stream that answers `call` and goes through `relay`."""

    def __init__(self, call: Call, relay: Relay) -> None:
        """Raises `CannotContinue` if streams of its kind do not move."""
        if relay.transcript is None:
            raise CannotContinue(f"streams of {call.path} do not")
        self._path = call.path
        self._relay = relay
        self._told = relay.transcript
        try:
            self._asked = parse_object(call.body)
        except BadRequest as error:
            raise CannotContinue(error.message) from None
        self._splice = Splice(self._told, self._asked, self._path)
        self._again = Again()

    def prepare(self) -> bool:
        """After a failure, forget what the client did not get. Returns whether it had all.

        Raises:
            CannotContinue: what is missing cannot be had faithfully.
        """
        self._relay.drop_tail()
        self._again = self._told.roll_back()
        self._splice = splice = Splice(self._told, self._asked, self._path)
        self._relay.splice = splice.feed
        if not self._told.finished:
            check(self._asked, self._told)
            if not splice.is_exhausted:
                return False
        ending = splice.ending()
        if ending:  # in HTTP's chunks, nothing would be the end
            self._relay.write(ending)
        return True

    def request(self, served_model_name: str, *, by_ids: bool) -> tuple[str, bytes]:
        """Path and body that make the next engine go on.

        Raises:
            CannotContinue: not with that engine.
        """
        repeats = by_ids and goes_by_ids(self._asked, self._told)
        self._splice.again = self._again if repeats else Again()
        try:
            path, body = continuation(self._path, self._asked, self._told, by_ids=by_ids)
        except (ValueError, TypeError) as error:
            raise CannotContinue(f"its request or its tokens are unusual: {error}") from None
        return path, json_bytes({**body, "model": served_model_name})
