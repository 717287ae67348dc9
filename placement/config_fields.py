"""Reading a model's configuration: fields that must be there, and values that must make sense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from placement.architecture import MultiheadLatentAttention
from placement.errors import ConfigError
from placement.spec import Spec

Config = Mapping[str, Any]
SpecT = TypeVar("SpecT", bound=Spec)


def required(name: str, config: Config, field: str) -> Any:
    """The value of `field`, which must be there."""
    value = config.get(field)
    if value is None:
        raise ConfigError(f"{name}: the configuration has no {field}")
    return value


def section(name: str, config: Config, field: str) -> Config:
    """The object under `field`, which must be there."""
    value = required(name, config, field)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}: {field} is {value!r} instead of an object")
    return value


def quotient(name: str, hidden: Any, heads: Any) -> int:
    """The head dimension that is meant when none is given."""
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or hidden % heads:
        raise ConfigError(f"{name}: without head_dim, hidden_size {hidden} / {heads} heads must do")
    return hidden // heads


def build(name: str, spec: type[SpecT], **fields: Any) -> SpecT:
    """A `spec` of these fields, or a ConfigError that names the wrong ones."""
    try:
        return spec.model_validate(fields, strict=True)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}, got {problem['input']!r}"
            for problem in error.errors()
        ]
        raise ConfigError(f"{name}: {'; '.join(problems)}") from None


def latent_attention(name: str, config: Config) -> MultiheadLatentAttention:
    """The five numbers of latent attention."""
    fields = MultiheadLatentAttention.model_fields
    return build(
        name,
        MultiheadLatentAttention,
        **{field: required(name, config, field) for field in fields},
    )


def window(name: str, config: Config) -> int | None:
    """The window of all layers; Qwen switches it off by another key, others by null or 0."""
    if config.get("use_sliding_window") is False:
        return None
    kinds = set(config.get("layer_types") or ())
    value = config.get("sliding_window")
    if isinstance(value, list) or len(kinds) > 1:
        raise ConfigError(f"{name}: windows that differ between layers are not supported")
    return None if kinds == {"full_attention"} else value or None
