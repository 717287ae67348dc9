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


def optional_section(name: str, config: Config, *fields: str) -> Config:
    """The object under the first of `fields` that is there, or an empty one."""
    for field in fields:
        if config.get(field):
            return section(name, config, field)
    return {}


def layer_kinds(name: str, config: Config) -> list[str]:
    """`layer_types`: for each layer how it attends; empty when all are alike."""
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ConfigError(f"{name}: layer_types is {kinds!r} instead of a list of names")
    return kinds


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
    """The window of the layers that have one; Qwen switches it off by another key, others by null."""
    if config.get("use_sliding_window") is False:
        return None
    kinds = set(layer_kinds(name, config))
    value = config.get("sliding_window")
    if isinstance(value, list) or kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"{name}: windows that differ between layers are not supported")
    return None if kinds == {"full_attention"} else value or None


def full_attention_layers(name: str, config: Config) -> int:
    """Layers without a window in a model whose other layers have one (gpt-oss: every other)."""
    if window(name, config) is None:
        return 0
    return layer_kinds(name, config).count("full_attention")
