"""Demand: the load that a model must carry, and the service level that holds under it."""

from __future__ import annotations

from typing import Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from placement.spec import Spec, mistake


class TokenLengths(Spec):
    """Distribution of a request's token counts."""

    mean: PositiveFloat = Field(description="Tokens.")
    p95: PositiveFloat | None = Field(default=None, description="Tokens; None: the mean.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.p95 is not None and self.p95 < self.mean:
            why = f"{self.p95:g} tokens are fewer than the mean of {self.mean:g}"
            raise mistake(f"{why}; give more, or leave p95 out", "p95")
        return self

    @property
    def in_words(self) -> str:
        """Tokens, rounded."""
        return f"{self.mean:,.0f}" + ("" if self.p95 is None else f" (p95 {self.p95:,.0f})")


class Demand(Spec):
    """Load that a model must carry. Or `trace: FILE`, see below: demand from a trace."""

    requests_per_s: NonNegativeFloat = Field(description="Of all clients together.")
    input_tokens: TokenLengths = Field(
        default=TokenLengths(mean=512), description="Prompt lengths; default mean 512."
    )
    output_tokens: TokenLengths = Field(
        default=TokenLengths(mean=128), description="Answer lengths; default mean 128."
    )
    prefix_hit: NonNegativeFloat = Field(
        default=0.0, le=1.0, description="Share of prompt tokens that the prefix cache has."
    )
    source: str = Field(
        default="",
        description="Where the numbers come from, told with the plan. Filled in from a trace.",
    )

    @property
    def in_words(self) -> str:
        """One line: rate, lengths, and where they come from."""
        return (
            f"{self.requests_per_s:.3g} requests/s, prompts of {self.input_tokens.in_words} tokens, "
            f"answers of {self.output_tokens.in_words}"
            + (f"; {self.source}" if self.source else "")
        )


class Objective(Spec):
    """Service level: percentiles that hold under the demand."""

    ttft_p95_s: PositiveFloat | None = Field(
        default=None, description="Time to first token, seconds."
    )
    tpot_p95_ms: PositiveFloat | None = Field(
        default=None, description="Time per output token, ms."
    )
