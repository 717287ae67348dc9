"""ModelCacheSpec: what nodes keep of downloaded checkpoints, as an operator writes it."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, PositiveFloat

from placement.spec import Spec


class ModelCacheSpec(Spec):
    """What each node keeps of downloaded checkpoints, in Hugging Face's cache (`HF_HOME` there)."""

    max_gib: PositiveFloat | None = Field(
        default=None,
        description="Of all models in it, GiB. Beyond that those that were used least recently go, "
        "never those that an engine uses. None: nothing is ever deleted.",
    )
    keep_free_gib: NonNegativeFloat = Field(
        default=5.0, description="To leave free on the disk, GiB: a download that would not, fails."
    )
    offline: bool = Field(
        default=False,
        description="Download nothing: checkpoints must be there. `HF_HUB_OFFLINE=1` does the same "
        "for one host.",
    )
