"""A fleet from its file, with numbers in place of the traces that it names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from placement.errors import ConfigError
from placement.fleet import Demand, FleetSpec
from placement.spec import checked, read_text
from placement.trace_demand import TraceDemand, demand_of
from placement.yaml_document import Loc, compose, dotted, line_of, node_at, plain_value

_NOTHING = Demand(requests_per_s=0.0)  # where a trace is wrong, to find what else is


def load_fleet(path: Path | str) -> FleetSpec:
    """Read a fleet file, and the traces that it names.

    Raises:
        ConfigError: a file cannot be read, or is wrong, with a line for each mistake.
    """
    path = Path(path)
    root = compose(read_text(path), str(path))
    value = plain_value(root, str(path))
    problems = []
    for at, model in _models_with_traces(value):
        try:
            demand = _derived(model["demand"], at, root, path)
        except ConfigError as error:
            problems.append(str(error))
            demand = _NOTHING
        model["demand"] = demand.model_dump(exclude_none=True)
    try:
        fleet = checked(value, FleetSpec, root, str(path))
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return fleet


def _derived(demand: object, at: Loc, root: yaml.Node, path: Path) -> Demand:
    """The numbers that a trace stands for; errors tell the place in the fleet too."""
    wish = checked(demand, TraceDemand, node_at(root, at), str(path), at=at)
    try:
        return demand_of(wish, path.parent)
    except ConfigError as error:
        where = (*at, "trace")
        raise ConfigError(f"{path}:{line_of(root, where)}: {dotted(where)}: {error}") from None


def _models_with_traces(value: Any) -> Iterator[tuple[Loc, dict[str, Any]]]:
    """Models of a fleet file whose demand names a trace, with the demands' places.

    The rest of the file may have any form: that is checked later.
    """
    models = value.get("models") if isinstance(value, dict) else None
    for index, model in enumerate(models if isinstance(models, list) else []):
        demand = model.get("demand") if isinstance(model, dict) else None
        if isinstance(demand, dict) and "trace" in demand:
            yield ("models", index, "demand"), model
