"""Pipeline stages: which layers a stage holds, and who keeps embedding and head."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """Consecutive layers on one tensor-parallel group."""

    index: int
    first_layer: int
    num_layers: int
    is_first: bool  # holds the input embedding
    is_last: bool  # holds the final norm and the head


def whole_model(num_layers: int) -> Stage:
    """The only stage of a model that is not cut."""
    return Stage(index=0, first_layer=0, num_layers=num_layers, is_first=True, is_last=True)


def pipeline_stages(
    num_layers: int, num_stages: int, partition: tuple[int, ...] = ()
) -> tuple[Stage, ...]:
    """The stages in order, with the layers of `partition` or of `layer_partition`."""
    counts = partition or layer_partition(num_layers, num_stages)
    starts = [sum(counts[:index]) for index in range(len(counts))]
    return tuple(
        Stage(
            index=index,
            first_layer=start,
            num_layers=count,
            is_first=index == 0,
            is_last=index == len(counts) - 1,
        )
        for index, (start, count) in enumerate(zip(starts, counts, strict=True))
    )


def layer_partition(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage, as vLLM splits them (distributed/utils.py get_pp_indices).

    Evenly; one more each for as many stages as layers remain, counted backwards from the last but
    one, because the last stage has the head too and the first the embedding.
    """
    each, remaining = divmod(num_layers, num_stages)
    counts = [each] * num_stages
    for back in range(2, remaining + 2):
        counts[-back] += 1
    return tuple(counts)
