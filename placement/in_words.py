"""Replicas in words, as explanations tell them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from placement.option import Option, ranks
from placement.plan import Variant
from placement.question import Question
from placement.routing_policy import Role
from placement.selection import Selection


def in_words(question: Question, selection: Selection, model: int) -> str:
    """What a model gets."""
    return " and ".join(
        _option_in_words(question.choices[index], selection.counts[index])
        for index in question.problem.of_model(model)
        if selection.counts[index]
    )


def _option_in_words(option: Option, replicas: int) -> str:
    return (
        f"{_for(option.candidate.role)}"
        f"{replicas} x {option.candidate.checkpoint.precision} on {option.hardware} "
        f"({ranks(option)}, {pools_in_words(part.pool.name for part in option.parts)}"
        f"{_layers(option.candidate.layer_partition)})"
    )


def variant_in_words(variant: Variant) -> str:
    """One variant of a plan, with how much of it is used."""
    return (
        f"{_for(variant.role)}"
        f"{variant.replicas} x {variant.shape.precision} on {variant.hardware} "
        f"({pools_in_words(variant.pools)}{_layers(variant.shape.layer_partition)}), "
        f"{100 * variant.predicted.utilization:.0f} % used"
    )


def pools_in_words(names: Iterable[str], word: str = "and") -> str:
    """Each once."""
    pools = list(dict.fromkeys(names))
    return f"pool{'s' if len(pools) > 1 else ''} {f' {word} '.join(pools)}"


def _layers(partition: Sequence[int]) -> str:
    return f", layers {'+'.join(map(str, partition))}" if partition else ""


def _for(role: Role) -> str:
    return "" if role == "whole" else f"{role}: "
