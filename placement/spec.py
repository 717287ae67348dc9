"""Typed YAML: frozen pydantic models and a loader whose errors name file, line and key."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from placement.errors import ConfigError, nearest
from placement.yaml_document import Loc, compose, dotted, line_of, own_path, plain_value


class Spec(BaseModel):
    """A frozen value whose unknown keys are errors, so that a typo in YAML does not pass."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


_FEW_VALUES = 6  # that an error may list; of more only the nearest are told
_IN_YAML = {  # what pydantic calls otherwise
    "tuple_type": "input should be a list",
    "list_type": "input should be a list",
    "model_type": "input should be a mapping (`key: value`)",
    "dict_type": "input should be a mapping (`key: value`)",
    "too_short": "input should be a list with at least one entry",
}
_NUMBER = r"[-+]?[0-9][0-9_]*(\.[0-9]*)?"

SpecT = TypeVar("SpecT", bound=BaseModel)


def load_yaml(path: Path | str, spec: type[SpecT]) -> SpecT:
    """Read `path` as one YAML document of the form `spec`.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or does not have that form. The message
            has a line for each mistake: file, line, key, what was expected, the nearest key.
    """
    path = Path(path)
    return parse_yaml(read_text(path), spec, source=str(path))


def read_text(path: Path) -> str:
    """What stands in a file of ours.

    Raises:
        ConfigError: it cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give a YAML file") from None
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise ConfigError(f"{path}: is no text in UTF-8 ({byte}); give a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def parse_yaml(text: str, spec: type[SpecT], *, source: str) -> SpecT:
    """As `load_yaml`, for text that is already there; `source` names it in errors."""
    root = compose(text, source)
    return checked(plain_value(root, source), spec, root, source)


def checked(
    value: object, spec: type[SpecT], root: yaml.Node, source: str, *, at: Loc = ()
) -> SpecT:
    """`value` as a `spec`; `root` is the node that says it, at the place `at` of its document.

    Raises:
        ConfigError: it does not have that form, as `load_yaml`.
    """
    try:
        # Through JSON, because strict mode then takes lists for tuples but no "8" for 8.
        return spec.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        told: dict[str, list[str]] = {}
        for problem in _told_once(error.errors(), root):
            told.setdefault(_where(problem, root, source, at), []).append(_expected(problem, spec))
        lines = [f"{where}: {_either(expected)}" for where, expected in told.items()]
        raise ConfigError("\n".join(lines)) from None


def mistake(why: str, *at: str | int) -> PydanticCustomError:
    """For a validator of a `Spec` to raise: what is wrong with the value `at` this place below it."""
    return PydanticCustomError("mistake", "{why}", {"why": why, "at": at})


def place(path: Path | str, *loc: str | int) -> str:
    """`file:line: key` of `loc` in a YAML file, for what turns out to be wrong after reading it."""
    try:
        root = compose(Path(path).read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, ConfigError):  # changed since
        return f"{path}: {dotted(loc)}"
    return f"{path}:{line_of(root, loc)}: {dotted(loc)}"


def dump_yaml(value: BaseModel) -> str:
    """`value` as YAML that `parse_yaml` reads back to an equal value."""
    return yaml.safe_dump(value.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _told_once(problems: Sequence[Any], root: yaml.Node) -> list[Any]:
    """`problems` at their own places in the document, without those that others explain.

    A list whose items are wrong is also called too short, because pydantic counts good items. And
    of a union every branch complains: the one that got furthest is meant.
    """
    placed = [
        {**each, "loc": own_path(root, (*each["loc"], *each.get("ctx", {}).get("at", ())))}
        for each in problems
    ]
    return [
        here
        for here, problem in zip(placed, problems, strict=True)
        if not (
            (here["type"] == "too_short" or len(here["loc"]) < len(problem["loc"]))
            and any(_is_below(other["loc"], here["loc"]) for other in placed)
        )
    ]


def _is_below(loc: Loc, above: Loc) -> bool:
    return len(loc) > len(above) and loc[: len(above)] == above


def _where(problem: Any, root: yaml.Node, source: str, at: Loc) -> str:
    """`file:line: key`."""
    line = line_of(root, problem["loc"], of_key=problem["type"] == "extra_forbidden")
    return f"{source}:{line}: {dotted((*at, *problem['loc'])) or 'document'}"


def _expected(problem: Any, spec: type[BaseModel]) -> str:
    """What was expected, and what stands there."""
    loc, kind, got = problem["loc"], problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return f"unknown key{nearest(str(loc[-1]), _fields_at(spec, loc[:-1]))}"
    if kind == "missing":
        return "required, but missing"
    if kind == "mistake":
        return str(problem["msg"])
    message = _IN_YAML.get(kind, problem["msg"].removeprefix("Value error, "))
    message = message[:1].lower() + message[1:]
    if kind == "literal_error" and isinstance(got, str):
        legal = re.findall("'([^']*)'", problem["ctx"]["expected"])
        if len(legal) > _FEW_VALUES:
            known = f"; known: {', '.join(legal)}"
            return f"{_short(got)} is not known{nearest(got, legal) or known}"
        close = nearest(got, legal)
        return f"{message}, got {_short(got)}{close if 'did you mean' in close else ''}"
    shown = f", got {_short(got)}" if isinstance(got, str | int | float | bool | None) else ""
    return f"{message}{shown}{_instead(kind, got)}"


def _instead(kind: str, got: object) -> str:
    """What to write instead of a value of the wrong type, where that is plain."""
    if kind in {"tuple_type", "list_type"} and isinstance(got, str):
        return f"; write [{got}]"
    if kind == "string_type" and isinstance(got, int | float) and not isinstance(got, bool):
        return f'; in quotes it is text: "{got}"'
    if kind == "int_type" and isinstance(got, float) and got.is_integer():
        return f"; write {got:.0f}"
    if kind in {"int_type", "float_type"} and isinstance(got, str):
        if re.fullmatch(_NUMBER, got):
            return "; write it without quotes"
        if re.match(rf"\W?{_NUMBER}", got):
            return "; write the number alone, without a unit"
    return ""


def _either(expected: Sequence[str]) -> str:
    """One sentence of what the branches of a union expected at the same place."""
    *first, last = dict.fromkeys(expected)
    start = [each.partition(", got ")[0] for each in first]
    rest = [each.removeprefix("input should be ") for each in (*start[1:], last)]
    return " or ".join([*start[:1], *rest]) if first else last


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _fields_at(spec: type[BaseModel], loc: Loc) -> list[str]:
    """Names of the fields that are legal at `loc`, following annotations as far as they are models."""
    current: Any = spec
    for part in loc:
        if isinstance(part, int) or not hasattr(current, "model_fields"):
            continue
        field = current.model_fields.get(part)
        models = _models_in(field.annotation) if field else []
        if not models:
            return []
        current = models[0]
    return list(getattr(current, "model_fields", {}))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    return [model for argument in arguments for model in _models_in(argument)]
