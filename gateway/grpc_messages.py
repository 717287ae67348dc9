"""OpenAI's JSON <-> our protobuf messages, whose field names are the same.

What a message has no field for is in its `extra_json`, so that nothing is lost either way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from gateway.errors import BadRequest

_EXTRA = "extra_json"


def to_json(message: Message) -> dict[str, Any]:
    """The fields that are set, with those of `extra_json` where they do not stand in the way.

    Raises:
        BadRequest: `extra_json` is no JSON object.
    """
    result: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.name == _EXTRA:
            continue
        if field.type != FieldDescriptor.TYPE_MESSAGE:
            result[field.name] = list(value) if field.is_repeated else value
        elif field.is_repeated:
            result[field.name] = [to_json(item) for item in value]
        else:
            result[field.name] = to_json(value)
    extra = getattr(message, _EXTRA, "")
    return {**_parsed(extra), **result} if extra else result


def fill(message: Message, values: Mapping[str, Any]) -> None:
    """Set `message` from JSON. Nulls are left out, misfits go to `extra_json`."""
    fields = message.DESCRIPTOR.fields_by_name
    extra = {}
    for name, value in values.items():
        field = fields.get(name)
        if value is None:
            continue
        if field is None or not _set(message, field, value):
            extra[name] = value
    if extra and _EXTRA in fields:
        setattr(message, _EXTRA, json.dumps(extra))


def _set(message: Message, field: Any, value: Any) -> bool:
    """Whether `value` has the field's form; if so it is set."""
    target = getattr(message, field.name)
    if field.is_repeated and not isinstance(value, list):
        return False
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        items = value if field.is_repeated else [value]
        if not all(isinstance(item, dict) for item in items):
            return False
        for item in items:
            fill(target.add() if field.is_repeated else target, item)
        if not field.is_repeated:
            target.SetInParent()
        return True
    try:
        if field.is_repeated:
            target.extend(value)
        else:
            setattr(message, field.name, value)
    except (TypeError, ValueError):
        return False
    return True


def _parsed(extra: str) -> dict[str, Any]:
    try:
        value = json.loads(extra)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"extra_json is not valid JSON: {error}", param=_EXTRA) from None
    if not isinstance(value, dict):
        raise BadRequest("extra_json must be a JSON object", param=_EXTRA)
    return value
