"""Adapters: to routing each is a model of its own, at those endpoints that have it loaded."""

from __future__ import annotations

from gateway.endpoints import Endpoint, EndpointTable, ServedModel


def with_adapters(table: EndpointTable) -> EndpointTable:
    """The table with models and endpoints for adapters, beside those of the models they adapt.

    What an endpoint has loaded, but its model does not list, is not routed to.
    """
    listed = {model.name: frozenset(model.adapters) for model in table.models if model.adapters}
    if not listed:
        return table
    models = [each for model in table.models for each in (model, *_adapters_of(model))]
    endpoints = [
        _as_adapter(endpoint, name, served)
        for endpoint in table.endpoints
        for name, served in endpoint.adapters.items()
        if name in listed.get(endpoint.model, ())
    ]
    return table.model_copy(
        update={"models": tuple(models), "endpoints": (*table.endpoints, *endpoints)}
    )


def _adapters_of(model: ServedModel) -> list[ServedModel]:
    """They scale and are routed as their model, but nothing stands in for them."""
    own = {"parent": model.name, "aliases": (), "fallback": (), "adapters": ()}
    return [model.model_copy(update={**own, "name": name}) for name in model.adapters]


def _as_adapter(endpoint: Endpoint, name: str, served: str) -> Endpoint:
    return endpoint.model_copy(update={"model": name, "served_model_name": served, "adapters": {}})
