"""What `GET /v1/models` and `ListModels` show."""

from __future__ import annotations

from gateway.admission import Admission
from gateway.bodies import ModelCard
from gateway.endpoints import ServedModel


def model_cards(admission: Admission) -> list[ModelCard]:
    """OpenAI's model objects, one per model, with our own fields added."""
    return [model_card(admission, model) for model in admission.router.models]


def model_card(admission: Admission, model: ServedModel) -> ModelCard:
    """One model. `max_model_len` falls back to the smallest that its endpoints name or say."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "bora",
        "parent": model.parent,
        "aliases": list(model.aliases),
        "capabilities": list(model.capabilities),
        "max_model_len": model.max_model_len or admission.router.context(model.name),
        "ready_endpoints": admission.router.num_ready(model.name),
    }
