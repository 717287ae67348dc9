"""From the labels of a Ray cluster's nodes to an inventory, and back."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from cluster.names import GPU_LABEL, KV_CACHE_LABEL, MEMORY_LABEL, POOL_LABEL, SLOT
from placement.errors import ConfigError
from placement.inventory import Inventory, Pool

# GPU type, devices, memory and KV cache in GiB
_Form = tuple[str | None, int, float | None, float | None]


def node_labels(pool: Pool) -> dict[str, str]:
    """Labels that a node of `pool` is started with."""
    labels = {POOL_LABEL: pool.name, GPU_LABEL: pool.gpu}
    if pool.memory_gib_per_gpu is not None:
        labels[MEMORY_LABEL] = str(pool.memory_gib_per_gpu)
    if pool.kv_cache_gib_per_gpu is not None:
        labels[KV_CACHE_LABEL] = str(pool.kv_cache_gib_per_gpu)
    return {**pool.labels, **labels}


def ray_inventory(nodes: Sequence[Mapping[str, Any]]) -> Inventory:
    """`nodes` as `ray.nodes()` gives them; dead ones and those without a pool label are left out.

    Raises:
        ConfigError: no node has the labels, the nodes of a pool differ, or a label is wrong.
    """
    pools = pooled(nodes)
    if not pools:
        raise ConfigError(
            f"no node of the Ray cluster carries the labels {POOL_LABEL} and {GPU_LABEL}; start "
            f"nodes with `ray start --labels {POOL_LABEL}=NAME,{GPU_LABEL}=TYPE`"
        )
    return Inventory(pools=tuple(pool_of(name, pools[name]) for name in pools))


def node_name(node: Mapping[str, Any]) -> str:
    """What plans and status call a node of `ray.nodes()`: two Ray nodes may share a host."""
    return f"{node['NodeManagerHostname']}-{node['NodeID'][:8]}"


def pooled(nodes: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Those that are alive and have a pool label, by pool, in order of its name."""
    pools: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for node in nodes:
        pool = node["Labels"].get(POOL_LABEL)
        if node["Alive"] and pool:
            pools[pool].append(node)
    return {name: pools[name] for name in sorted(pools)}


def unlabelled(node: Mapping[str, Any]) -> str:
    """Why nothing will ever be placed on a node that has devices; empty: it has none, or a label."""
    count = _devices(node)
    if not count or node["Labels"].get(POOL_LABEL):
        return ""
    return (
        f"{node_name(node)} has {count} GPUs or slots but no label {POOL_LABEL}, so nothing is "
        f"placed there; restart its Ray node with `--labels {POOL_LABEL}=NAME,{GPU_LABEL}=TYPE`"
    )


def pool_of(name: str, nodes: Sequence[Mapping[str, Any]]) -> Pool:
    """The pool that these nodes' labels and resources make.

    Raises:
        ConfigError: they differ, or a label is missing or wrong; names the nodes.
    """
    forms: defaultdict[_Form, list[str]] = defaultdict(list)
    for node in nodes:
        labels = node["Labels"]
        memory, cache = (_gib(node, label) for label in (MEMORY_LABEL, KV_CACHE_LABEL))
        forms[labels.get(GPU_LABEL), _devices(node), memory, cache].append(node_name(node))
    if len(forms) > 1:
        listed = "; ".join(f"{', '.join(names)}: {_form(form)}" for form, names in forms.items())
        raise ConfigError(
            f"the nodes of pool {name} differ: {listed}. Give those that are another kind another "
            f"{POOL_LABEL}, or correct their labels (`bora probe --ray-start`)"
        )
    [(gpu, devices, memory, cache)] = forms
    if gpu is None or devices == 0:
        raise ConfigError(
            f"the nodes of pool {name} have no {GPU_LABEL} label, or no GPU and no {SLOT}: "
            f"{', '.join(map(node_name, nodes))}"
        )
    try:
        return Pool.model_validate(
            {
                "name": name,
                "gpu": gpu,
                "nodes": len(nodes),
                "gpus_per_node": devices,
                "memory_gib_per_gpu": memory,
                "kv_cache_gib_per_gpu": cache,
                "labels": _common_labels(nodes),
                "node_names": tuple(sorted(node_name(node) for node in nodes)),
            }
        )
    except ValidationError as error:
        why = "; ".join(f"{each['loc'][:1]} {each['msg']}" for each in error.errors())
        raise ConfigError(
            f"the labels of {', '.join(map(node_name, nodes))} make no pool {name!r}: {why}"
        ) from error


def _gib(node: Mapping[str, Any], label: str) -> float | None:
    text = node["Labels"].get(label)
    try:
        gib = float(text) if text else None
    except ValueError:
        gib = math.nan
    if gib is None or 0 < gib < math.inf:
        return gib
    raise ConfigError(
        f"{node_name(node)}: its label {label} is {text!r}; restart its Ray node with a number of "
        f"GiB, e.g. {label}=79.1"
    )


def _form(form: _Form) -> str:
    gpu, devices, memory, cache = form
    figures = (f"{devices} x {gpu or f'(no {GPU_LABEL})'}", memory, cache)
    return " ".join(str(each) for each in figures if each is not None)


def _common_labels(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The operator's own (zone, rack ...) that all nodes of the pool share; not Ray's, not ours."""
    first, *others = (node["Labels"] for node in nodes)
    return {
        key: value
        for key, value in first.items()
        if not key.startswith(("ray.io/", "bora."))
        and all(labels.get(key) == value for labels in others)
    }


def _devices(node: Mapping[str, Any]) -> int:
    resources = node["Resources"]
    return int(resources.get("GPU", 0) or resources.get(SLOT, 0))
