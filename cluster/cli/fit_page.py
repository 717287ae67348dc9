"""The answer of `bora fit` as a page for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cluster.cli.fit_fleet import fleet_yaml
from cluster.cli.render import error_bar
from placement.catalogue import ModelSpec, VendorFigures
from placement.fit_answer import FitAnswer, FitRanking, FitShape
from placement.fit_claims import Claim
from placement.fit_summary import called, closest
from placement.plan import GpuMemory, Rejection

GIB = 2**30
_BAR_WIDTH = 64
_MOST_SHAPES, _MOST_REJECTED, _MOST_RANKED = 12, 8, 20
_COLOURS = {"fits": "green", "tight": "yellow", "offload": "yellow", "does_not_fit": "red"}
_PARTS = (
    ("weights", "#", "blue"),
    ("activations", "a", "magenta"),
    ("other", "o", "cyan"),
    ("KV cache", "=", "green"),
    ("free", ".", "bright_black"),
)


def fit_page(answer: FitAnswer, model: ModelSpec) -> RenderableType:
    """Verdict, memory, shapes, limits, ways out, the command line and a fleet to paste."""
    parts: list[RenderableType] = [Text(answer.summary, style=_COLOURS[answer.verdict])]
    parts.append(Text(_facts(answer)))
    if answer.best is not None:
        parts += [Text(), _memory(answer.best)]
    if answer.shapes:
        parts += [Text(), _shapes(answer.shapes)]
    if answer.rejected:
        parts += [Text(), *_rejections(answer.rejected)]
    if answer.advice:
        parts += [Text(), Text("cheapest ways out", style="bold")]
        parts += [Text(f"  {advice}") for advice in answer.advice]
    if answer.best is not None:
        parts += _to_run(answer, answer.best, model)
    parts += _footnotes(answer)
    return Group(*parts)


def ranking_page(ranking: FitRanking) -> RenderableType:
    """GPU types and counts that the model fits on, cheapest first."""
    columns = (
        "GPUs",
        "verdict",
        "USD/h",
        "USD/M out",
        "shape",
        "context",
        "KV tokens",
        "TPOT",
    )
    table = Table(*columns, box=None)
    shown = [entry for entry in ranking.ranking if entry.best is not None][:_MOST_RANKED]
    for entry in shown:
        shape = entry.best
        if shape is None:
            continue
        price, million = entry.price_per_hour, entry.price_per_million_output_tokens
        table.add_row(
            f"{entry.num_gpus} x {entry.gpu}",
            Text(entry.verdict, style=_COLOURS[entry.verdict]),
            "-" if price is None else f"{price:.2f}",
            "-" if million is None else f"{million:.2f}",
            called(shape),
            f"{shape.max_model_len:,}",
            f"{shape.kv_cache_tokens:,}",
            f"{shape.prediction.tpot_ms:.1f} ms",
        )
    left = len(ranking.ranking) - len(shown)
    head = Text(
        f"{ranking.model}, {ranking.parameters / 1e9:.1f} B parameters: cheapest first, for "
        f"{ranking.concurrency} requests at once"
    )
    note = f"{left} other types and counts do not fit, or are dearer (--json lists all)"
    return Group(head, table, Text(note, style="bright_black"))


def claims_page(claims: Iterable[Claim]) -> RenderableType:
    """Claim by claim."""
    parts: list[RenderableType] = []
    for claim in claims:
        verdict = Text("holds", style="green") if claim.holds else Text("no", style="red")
        parts.append(Text.assemble((f"{claim.page}: ", "bold"), claim.says, ": ", verdict))
        parts.append(Padding(Text(claim.truth), (0, 0, 1, 4)))
    return Group(*parts)


def _facts(answer: FitAnswer) -> str:
    known = {
        "header": "read from the file headers",
        "catalogue": "published",
        "arithmetic": "computed from bits per weight",
    }[answer.sizes_from]
    active = ""
    if answer.active_parameters != answer.parameters:
        active = f", {answer.active_parameters / 1e9:.1f} B active"
    price = ""
    if answer.price_per_hour is not None:
        price = f"; these GPUs: {answer.price_per_hour:.2f} USD/h"
    return (
        f"{answer.parameters / 1e9:.2f} B parameters{active}; checkpoint "
        f"{answer.checkpoint_bytes / 1e9:.1f} GB ({known}); context {answer.context:,}{price}"
    )


def _memory(shape: FitShape) -> RenderableType:
    """One bar for each kind of GPU."""
    lines: list[RenderableType] = []
    alike = len(shape.gpus) == 1
    for index, memory in enumerate(shape.gpus):
        name = f"each of {shape.gpus_per_replica}" if alike else f"GPU {index}"
        label = name if shape.gpus_per_replica > 1 else "GPU"
        if shape.gpu_layers is not None and memory.weights_bytes == 0:
            label = "host"
        lines.append(Text(f"{label:>10} ") + _bar(memory))
        lines.append(Text(f"{'':>10} {_amounts(memory)}", style="bright_black"))
    if shape.host_memory_bytes:
        lines.append(Text(f"{'host':>10} {shape.host_memory_bytes / GIB:.1f} GiB"))
    return Group(*lines)


def _bar(memory: GpuMemory) -> Text:
    """Letters as well as colours: a bar must be readable in a log."""
    bar, total, end, column = Text("["), max(1, memory.total_bytes), 0, 0
    for (_, letter, colour), size in zip(_PARTS, _sizes(memory), strict=True):
        end += size
        until = min(_BAR_WIDTH, round(end / total * _BAR_WIDTH))
        bar.append(letter * max(0, until - column), style=colour)
        column = max(column, until)
    return bar.append(f"] {memory.total_bytes / GIB:.1f} GiB")


def _amounts(memory: GpuMemory) -> str:
    return ", ".join(
        f"{letter} {name} {size / GIB:.2f}"
        for (name, letter, _), size in zip(_PARTS, _sizes(memory), strict=True)
    )


def _sizes(memory: GpuMemory) -> tuple[int, ...]:
    return (
        memory.weights_bytes,
        memory.activation_bytes,
        memory.non_torch_bytes + memory.cuda_graph_bytes + memory.adapter_bytes,
        memory.kv_cache_bytes,
        memory.headroom_bytes,
    )


def _shapes(shapes: Sequence[FitShape]) -> RenderableType:
    columns = ("shape", "verdict", "GPUs", "replicas", "context", "KV tokens", "x context")
    table = Table(*columns, "TTFT", "TPOT", "tokens/s", "limit", box=None)
    for shape in shapes[:_MOST_SHAPES]:
        table.add_row(
            called(shape),
            Text(shape.verdict, style=_COLOURS[shape.verdict]),
            str(shape.gpus_per_replica),
            str(shape.replicas),
            f"{shape.max_model_len:,}",
            f"{shape.kv_cache_tokens:,}",
            f"{shape.max_concurrency:.1f}",
            f"{shape.prediction.ttft_s:.2f} s{error_bar(shape.prediction.ttft_error)}",
            f"{shape.prediction.tpot_ms:.1f} ms{error_bar(shape.prediction.tpot_error)}",
            f"{shape.prediction.output_tokens_per_s:.0f}",
            shape.limit,
        )
    if len(shapes) > _MOST_SHAPES:
        table.add_row(f"... {len(shapes) - _MOST_SHAPES} more (--json)")
    return table


def _rejections(rejected: Sequence[Rejection]) -> list[RenderableType]:
    """One line for each rule and precision, with the reason of the shape that came closest."""
    seen: dict[tuple[str, str], list[Rejection]] = {}
    for entry in rejected:
        key = (entry.rule, str(entry.shape.get("precision", "")))
        seen.setdefault(key, []).append(entry)
    lines: list[RenderableType] = [Text(f"not possible: {len(rejected)} shapes", style="bold")]
    for (rule, precision), entries in list(seen.items())[:_MOST_REJECTED]:
        more = f" (and {len(entries) - 1} more)" if len(entries) > 1 else ""
        nearest = closest(entries) or entries[0]
        lines.append(Text(f"  {precision} {rule}: {nearest.reason}{more}"))
    if len(seen) > _MOST_REJECTED:
        lines.append(Text(f"  ... {len(seen) - _MOST_REJECTED} more kinds (--json)"))
    return lines


def _to_run(answer: FitAnswer, best: FitShape, model: ModelSpec) -> list[RenderableType]:
    program = "llama-server"
    if best.engine == "vllm":
        program = "python -m vllm.entrypoints.openai.api_server"
    environment = "".join(f"{key}={value} " for key, value in best.engine_environment.items())
    return [
        Text(),
        Text("command", style="bold"),
        Text(f"  {environment}{program} {shlex.join(best.engine_args)}"),
        Text(),
        Text("fleet", style="bold"),
        Text(fleet_yaml(answer, best, model)),
    ]


def _footnotes(answer: FitAnswer) -> list[RenderableType]:
    notes = [*(answer.best.notes if answer.best else ()), *answer.notes, *_vendor(answer)]
    if not notes:
        return []
    return [Text("notes", style="bold"), *(Text(f"  {note}") for note in notes)]


def _vendor(answer: FitAnswer) -> list[str]:
    figures: VendorFigures | None = answer.vendor_figures
    if figures is None:
        return []
    lines = [f"the vendor says: {statement}" for statement in figures.statements]
    if figures.min_gpu_memory_gb is not None:
        given = figures.min_gpu_memory_gb.model_dump(exclude_none=True)
        memory = ", ".join(f"{precision} {size:g} GB" for precision, size in given.items())
        lines.insert(0, f"the vendor's figure for GPU memory (not ours): {memory}")
    return lines
