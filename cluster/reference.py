"""The reference of bora's YAML files, from the field descriptions of their pydantic models."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from gateway.endpoints import EndpointsFile
from gateway.tenants import KeyFile
from placement.calibration import Calibration
from placement.catalogue import GpuType, ModelSpec, Precision
from placement.fleet import FleetSpec
from placement.inventory import Inventory
from placement.trace_demand import TraceDemand

FILES: dict[str, type[BaseModel]] = {
    "Fleet (`bora up`, `bora plan`, `bora deploy`)": FleetSpec,
    "Demand from a trace (`models[].demand` of a fleet)": TraceDemand,
    "Inventory (`--inventory`)": Inventory,
    "Endpoints (`bora gateway --endpoints`)": EndpointsFile,
    "Keys (`bora gateway --keys`, written by `bora keys`)": KeyFile,
    "Measured (`calibration.yaml` in bora's state folder, written by the cluster)": Calibration,
    "Model (`configs/models/`)": ModelSpec,
    "GPU type (`configs/gpus/`)": GpuType,
}
HEAD = """# The YAML files

Made by `make docs` from the descriptions in the code; change it there. Unknown keys are errors.
"""


def reference() -> str:
    """Markdown: a section a file, a table a mapping within it."""
    parts = [HEAD]
    for title, root in FILES.items():
        parts.append(f"## {title}\n")
        parts += [_table(name, model) for name, model in _models(root, "", set())]
    return "\n".join(parts)


def _models(
    model: type[BaseModel], path: str, seen: set[type[BaseModel]]
) -> Iterator[tuple[str, type[BaseModel]]]:
    """`model` and every model below it, each with the path of the key that holds it."""
    if model in seen:
        return
    seen.add(model)
    yield path, model
    for name, field in model.model_fields.items():
        for inner in _inner_models(field.annotation):
            many = "[]" if get_origin(field.annotation) is tuple else ""
            yield from _models(inner, f"{path}.{name}{many}".lstrip("."), seen)


def _table(path: str, model: type[BaseModel]) -> str:
    lines = [f"### `{path}`\n"] if path else []
    lines += [(model.__doc__ or "").strip().splitlines()[0], ""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        meaning = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _inner_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _inner_models(argument)]


_SCALARS = {str: "text", int: "integer", float: "number", bool: "true / false"}


def _type(annotation: Any) -> str:
    """What to write there, in words."""
    if annotation is Precision:
        return "precision (fp8, nvfp4, q4_k_m, ...)"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " / ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type(inner) for inner in arguments if inner is not NoneType)
    if origin is Annotated:  # PositiveInt and the like
        return _type(arguments[0])
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    return _SCALARS.get(annotation, "mapping")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    if field.default is PydanticUndefined or isinstance(field.default, BaseModel):
        return "see below" if isinstance(field.default, BaseModel) else "empty"
    if field.default in ((), ""):
        return "empty"
    return "-" if field.default is None else f"`{field.default}`"
