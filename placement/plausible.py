"""Numbers that no model has: a damaged or hostile configuration must not become a plan."""

from __future__ import annotations

from placement.architecture import Architecture
from placement.errors import ConfigError
from placement.parameters import count_parameters

# Far above any model there is, far below where arithmetic or loops over layers suffer.
_AT_MOST = {
    "num_layers": 2_000,
    "hidden_size": 1 << 20,
    "num_heads": 1 << 16,
    "num_kv_heads": 1 << 16,
    "head_dim": 1 << 16,
    "intermediate_size": 1 << 22,
    "vocab_size": 1 << 26,
    "max_position": 1 << 32,
}
_MOST_EXPERTS = 1 << 16
_MOST_PARAMETERS = 10**15


def refuse_implausible(name: str, architecture: Architecture) -> None:
    """Do nothing for a model that could exist.

    Raises:
        ConfigError: with the number that is too large.
    """
    for field, most in _AT_MOST.items():
        value = getattr(architecture, field)
        if value is not None and value > most:
            raise ConfigError(f"{name}: {field} is {value:,}; no model has more than {most:,}")
    moe = architecture.moe
    if moe is not None and moe.num_experts > _MOST_EXPERTS:
        raise ConfigError(f"{name}: num_experts is {moe.num_experts:,}")
    if moe is not None and moe.num_experts_per_token > moe.num_experts:
        raise ConfigError(
            f"{name}: a token cannot use {moe.num_experts_per_token} of {moe.num_experts} experts"
        )
    total = count_parameters(architecture).total
    if total > _MOST_PARAMETERS:
        raise ConfigError(f"{name}: the numbers make {total:,} parameters")
