"""JSON bodies of the HTTP API: what the gateway says, and what it reads of what others say."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict  # pydantic asks for it before Python 3.12


class Error(TypedDict):
    """OpenAI's error object. Engines' own may hold more, and a number as `code`."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorBody(TypedDict):
    """OpenAI's error body."""

    error: Error


class ModelCard(TypedDict):
    """OpenAI's model object, with fields of ours."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    aliases: list[str]
    capabilities: list[str]
    max_model_len: int | None
    ready_endpoints: int


class ModelList(TypedDict):
    """`GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class StatusBody(TypedDict):
    """`GET /health` and `GET /ready`."""

    status: Literal["ok", "ready"]


class RoutedBody(BaseModel):
    """A request for an engine: the rest is the engine's."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str = Field(min_length=1, description="A model's name or an alias.")


class FollowUpBody(RoutedBody):
    """A request that may go on from a stored response."""

    previous_response_id: str | None = Field(
        None, min_length=1, description="Goes to the engine that holds that response."
    )
