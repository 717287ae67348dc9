"""What an engine's own report says of the plan that it was started from."""

from __future__ import annotations

from placement.calibration import TOLERANCE, Observation
from placement.plan import Variant
from placement.setups import setup_of


def observe(
    variant: Variant, *, weights_bytes: int | None, kv_cache_tokens: int | None, observed: str
) -> Observation | None:
    """What an engine of `variant` reported, if the prediction was off by more than `TOLERANCE`.

    What a GPU's engine calls loaded has the room for adapters in it.
    """
    memory = variant.shape.per_gpu
    loaded = memory.weights_bytes + (0 if variant.gpu == "cpu" else memory.adapter_bytes)
    observation = Observation(
        setup=setup_of(variant.shape, checkpoint=variant.checkpoint, gpu=variant.gpu),
        model=variant.catalogue_model,
        observed=observed,
        kv_bytes_per_token=variant.shape.kv_bytes_per_token,
        predicted_weights_bytes=loaded,
        measured_weights_bytes=weights_bytes,
        predicted_kv_cache_tokens=variant.shape.kv_cache_tokens,
        measured_kv_cache_tokens=kv_cache_tokens,
    )
    return observation if observation.error > TOLERANCE else None
