"""What Ray keeps of bora's actors: they start again after newer code has come to their host."""

from __future__ import annotations

import importlib
import pickletools

import pytest
import ray
from ray import cloudpickle


@pytest.mark.filterwarnings("ignore")  # Ray Serve's own use of pydantic
@pytest.mark.parametrize("name", ["ControllerActor", "GatewayActor"])
def test_an_actor_names_no_method_that_newer_code_may_lack(name: str):
    kind = getattr(importlib.import_module("cluster.bootstrap"), name)

    kept = cloudpickle.dumps(ray.remote(kind).__ray_metadata__.modified_class)

    named = {said for _, said, _ in pickletools.genops(kept) if isinstance(said, str)}
    called = {"start", "stop", "report", "gateway_ended"}
    assert {said for said in named if said.startswith(("Controller", "Gateway"))} <= {
        name,
        *(f"{name}.{method}" for method in ("__init__", *called)),
    }
