"""Typed YAML: frozen pydantic models and a loader whose errors name file, line and key."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from placement.errors import ConfigError, nearest

# The C parser where PyYAML has it: eight times faster, and the catalogue is read at each start.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Spec(BaseModel):
    """A frozen value whose unknown keys are errors, so that a typo in YAML does not pass."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SpecT = TypeVar("SpecT", bound=BaseModel)


def load_yaml(path: Path | str, spec: type[SpecT]) -> SpecT:
    """Read `path` as one YAML document of the form `spec`.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or does not have that form. The message
            has a line for each mistake: file, line, key, what was expected, the nearest key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return parse_yaml(text, spec, source=str(path))


def parse_yaml(text: str, spec: type[SpecT], *, source: str) -> SpecT:
    """As `load_yaml`, for text that is already there; `source` names it in errors."""
    try:
        root = _compose(text)
        value = None if root is None else yaml.SafeLoader("").construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}: not valid YAML: {problem}") from None
    if root is None:
        raise ConfigError(f"{source}: the file is empty")
    _refuse_duplicate_keys(root, source)
    try:
        # Through JSON, because strict mode then takes lists for tuples but no "8" for 8.
        return spec.model_validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        problems = error.errors()
        lines = [
            _describe(problem, root, spec, source)
            for problem in problems
            if not _follows_from_another(problem, problems)
        ]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _compose(text: str) -> yaml.Node | None:
    """With the C parser; what it refuses again in Python, whose errors say more and where."""
    try:
        return yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError:
        return yaml.compose(text, Loader=yaml.SafeLoader)


def dump_yaml(value: BaseModel) -> str:
    """`value` as YAML that `parse_yaml` reads back to an equal value."""
    return yaml.safe_dump(value.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _follows_from_another(problem: Any, problems: Sequence[Any]) -> bool:
    """A list whose items are wrong is also called too short, because pydantic counts good items."""
    loc = tuple(problem["loc"])
    deeper = [other for other in problems if tuple(other["loc"])[: len(loc)] == loc]
    return problem["type"] == "too_short" and len(deeper) > 1


def _describe(problem: Any, root: yaml.Node, spec: type[BaseModel], source: str) -> str:
    """One mistake as `file:line: key: what was expected`."""
    loc = tuple(problem["loc"])
    extra = problem["type"] == "extra_forbidden"
    node = _node_at(root, loc, want_key=extra)
    key = _dotted(loc)
    if extra:
        known = _fields_at(spec, loc[:-1])
        return (
            f"{source}:{node.start_mark.line + 1}: {key}: unknown key{nearest(str(loc[-1]), known)}"
        )
    if problem["type"] == "missing":
        return f"{source}:{node.start_mark.line + 1}: {key}: required, but missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    got = problem.get("input")
    shown = f", got {got!r}" if isinstance(got, str | int | float | bool | None) else ""
    return f"{source}:{node.start_mark.line + 1}: {key or 'document'}: {message}{shown}"


def _dotted(loc: tuple[str | int, ...]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _node_at(root: yaml.Node, loc: tuple[str | int, ...], *, want_key: bool) -> yaml.Node:
    """The deepest YAML node on the way to `loc` (its key, if that is what is wrong)."""
    node = root
    for depth, part in enumerate(loc):
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            if part >= len(node.value):
                break
            node = node.value[part]
        elif isinstance(node, yaml.MappingNode):
            pair = next((p for p in node.value if p[0].value == str(part)), None)
            if pair is None:
                continue  # a missing key, or a union tag that pydantic put into the path
            node = pair[0] if want_key and depth == len(loc) - 1 else pair[1]
    return node


def _fields_at(spec: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
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


def _refuse_duplicate_keys(node: yaml.Node, source: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise ConfigError(
                    f"{source}:{line}: {key.value}: the key stands twice (first on line {seen[key.value]})"
                )
            seen[key.value] = line
            _refuse_duplicate_keys(value, source)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicate_keys(item, source)
