"""A plan as a picture: nodes with their GPUs, coloured by model, each GPU a memory bar."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from placement.inventory import Inventory, Pool
from placement.plan import GpuMemory, Plan, Variant
from placement.routing_policy import Role

WIDTH = 1120
GIB = 2**30
# Okabe and Ito's colours, which people with any colour vision tell apart; then their lighter kin.
PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a7a00", "#7b5ea7",
    "#4d9221", "#b2182b", "#5e8ab4", "#c49c3d", "#35978f", "#a8709c", "#b35806", "#80b1d3",
)  # fmt: skip
_LETTERS: Mapping[Role, str] = {"whole": "", "prefill": "P", "decode": "D"}
_GOLDEN = 0.618034  # of a turn: no two hues fall together
STYLE = """
:root { --page: #ffffff; --ink: #1c2128; --quiet: #667080; --line: #d5dae1; --panel: #f5f7f9;
  --empty: #e9edf1; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --ink: #e6e9ee; --quiet: #97a1b0;
  --line: #343b46; --panel: #1c2129; --empty: #272e38; } }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--ink); }
svg .quiet { fill: var(--quiet); } svg .panel { fill: var(--panel); stroke: var(--line); }
svg .empty { fill: var(--empty); } svg .on { fill: #ffffff; stroke: #1c2128; stroke-width: 2.5px; paint-order: stroke; }
"""


@dataclass(frozen=True, slots=True)
class _Scale:
    """Sizes in pixels, by how many GPUs must find room."""

    cell: int  # width of a GPU
    height: int
    gap: int
    label: bool  # nodes and replicas are named in the picture, else only on hover

    @classmethod
    def of(cls, gpus: int) -> _Scale:
        if gpus <= 48:
            return cls(cell=56, height=84, gap=6, label=True)
        if gpus <= 640:
            return cls(cell=24, height=40, gap=3, label=True)
        if gpus <= 2048:
            return cls(cell=10, height=18, gap=2, label=False)
        return cls(cell=5, height=9, gap=1, label=False)


@dataclass(frozen=True, slots=True)
class _Replica:
    variant: Variant
    number: int  # from 1
    gpus: tuple[int, ...]


def plan_svg(plan: Plan, inventory: Inventory) -> str:
    """One picture that stands alone, light or dark as its reader has it."""
    body, height = drawing(plan, inventory)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-label="GPUs of fleet {escape(plan.fleet)}">'
        f"<style>{STYLE}</style>"
        f'<rect width="{WIDTH}" height="{height}" style="fill: var(--page)"/>{body}</svg>\n'
    )


def drawing(plan: Plan, inventory: Inventory) -> tuple[str, int]:
    """The picture's elements, and its height; `STYLE` belongs to it."""
    colours = colours_of(plan)
    by_node: dict[str, list[_Replica]] = {}
    for variant in plan.variants:
        for number, placement in enumerate(variant.placement, start=1):
            for node in placement:
                by_node.setdefault(node.node, []).append(_Replica(variant, number, node.gpus))
    scale = _Scale.of(sum(pool.nodes * pool.gpus_per_node for pool in inventory.pools))
    parts, top = list(_legend(plan, colours)), _legend_height(plan)
    for pool in sorted(inventory.pools, key=lambda each: each.name):
        drawn, top = _pool(pool, by_node, colours, scale, top)
        parts += drawn
    return "".join(parts), top + 8


def colours_of(plan: Plan) -> dict[str, str]:
    """A colour for each model, always the same for the same fleet."""
    names = sorted({variant.model for variant in plan.variants})
    return {name: _colour(index) for index, name in enumerate(names)}


def _colour(index: int) -> str:
    """One of the palette; beyond it hues that are far from those just before."""
    if index < len(PALETTE):
        return PALETTE[index]
    rgb = colorsys.hls_to_rgb(index * _GOLDEN % 1, (0.38, 0.56)[index % 2], 0.5)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def _legend_rows(plan: Plan) -> list[list[tuple[str, int]]]:
    """Models in rows that fit the width, each with where it begins."""
    rows: list[list[tuple[str, int]]] = [[]]
    left = 0
    for name in colours_of(plan):
        width = 34 + 7 * len(name)
        if left + width > WIDTH - 300 and rows[-1]:
            rows.append([])
            left = 0
        rows[-1].append((name, left))
        left += width
    return rows


def _legend_height(plan: Plan) -> int:
    return 12 + 22 * len(_legend_rows(plan))


def _legend(plan: Plan, colours: dict[str, str]) -> Iterator[str]:
    for number, row in enumerate(_legend_rows(plan)):
        for name, left in row:
            top = 6 + 22 * number
            yield _rect(left, top, 12, 12, f'rx="3" fill="{colours[name]}"')
            yield _text(left + 18, top + 11, name, size=13)
    left = WIDTH - 270
    for label, opacity, width in (
        ("weights", 1.0, 80),
        ("KV cache", 0.55, 88),
        ("other", 0.28, 66),
    ):
        yield _rect(left, 6, 12, 12, f'rx="3" fill="#808890" fill-opacity="{opacity}"')
        yield _text(left + 17, 17, label, size=12, quiet=True)
        left += width


def _pool(
    pool: Pool,
    by_node: dict[str, list[_Replica]],
    colours: dict[str, str],
    scale: _Scale,
    top: int,
) -> tuple[list[str], int]:
    """A pool's elements below `top`, and where they end."""
    names = pool.names()
    used = sum(len(replica.gpus) for name in names for replica in by_node.get(name, ()))
    nodes = "node" if pool.nodes == 1 else "nodes"
    head = f"{pool.name}: {pool.nodes:,} {nodes} of {pool.gpus_per_node} x {pool.gpu}"
    parts = [
        _text(0, top + 18, head, size=15, bold=True),
        _text(
            WIDTH, top + 18, f"{used:,} of {pool.nodes * pool.gpus_per_node:,} used", size=13,
            quiet=True, end=True,
        ),
    ]  # fmt: skip
    columns = min(pool.gpus_per_node, 16)
    rows = math.ceil(pool.gpus_per_node / columns)
    pad = scale.gap * 2
    width = columns * (scale.cell + scale.gap) - scale.gap + 2 * pad
    height = rows * (scale.height + scale.gap) - scale.gap + 2 * pad
    step_x, step_y = width + 2 * scale.gap, height + 2 * scale.gap + (16 if scale.label else 0)
    per_row = max(1, (WIDTH + 2 * scale.gap) // step_x)
    top += 28
    for index, name in enumerate(names):
        x, y = index % per_row * step_x, top + index // per_row * step_y
        parts.append(_rect(x, y, width, height, 'class="panel" rx="4"', title=name))
        if scale.label:
            parts.append(_text(x + 2, y + height + 13, _short(name, width), size=11, quiet=True))
        parts += _gpus(pool, by_node.get(name, ()), colours, scale, (x + pad, y + pad))
    return parts, top + math.ceil(len(names) / per_row) * step_y + 12


def _gpus(
    pool: Pool,
    replicas: Sequence[_Replica],
    colours: dict[str, str],
    scale: _Scale,
    corner: tuple[int, int],
) -> Iterator[str]:
    columns = min(pool.gpus_per_node, 16)
    owner = {gpu: replica for replica in replicas for gpu in replica.gpus}
    for gpu in range(pool.gpus_per_node):
        x = corner[0] + gpu % columns * (scale.cell + scale.gap)
        y = corner[1] + gpu // columns * (scale.height + scale.gap)
        replica = owner.get(gpu)
        if replica is None:
            yield _rect(
                x, y, scale.cell, scale.height, 'class="empty" rx="2"', title=f"GPU {gpu}: free"
            )
            continue
        colour = colours[replica.variant.model]
        if gpu - 1 in replica.gpus and gpu % columns:  # joined with its neighbour
            band, fill = scale.height // 12, f'fill="{colour}"'
            if not scale.label:  # too small for a band
                band, fill = scale.height, f'{fill} fill-opacity="0.28"'
            yield _rect(x - scale.gap, y + scale.height - band, scale.gap, band, fill)
        yield from _bar(replica, gpu, colour, scale, (x, y))


def _bar(
    replica: _Replica, gpu: int, colour: str, scale: _Scale, corner: tuple[int, int]
) -> Iterator[str]:
    """One GPU: weights at the bottom, then the KV cache, then the rest; free memory stays empty."""
    x, y = corner
    memory = replica.variant.shape.per_gpu
    yield f"<g><title>{escape(_told(replica, gpu, memory))}</title>"
    yield _rect(x, y, scale.cell, scale.height, 'class="empty" rx="2"')
    total = max(memory.total_bytes, 1)
    other = memory.activation_bytes + memory.non_torch_bytes + memory.cuda_graph_bytes
    other += memory.adapter_bytes
    bottom = float(y + scale.height)
    parts = ((memory.weights_bytes, 1.0), (memory.kv_cache_bytes, 0.55), (other, 0.28))
    for size, opacity in parts if _computes(replica, gpu) else ():
        high = scale.height * min(1.0, size / total)
        bottom -= high
        if high > 0.05:
            yield _rect(x, bottom, scale.cell, high, f'fill="{colour}" fill-opacity="{opacity:g}"')
    if scale.label:
        label = f"{_LETTERS[replica.variant.role]}{replica.number}"
        yield (
            f'<text x="{x + scale.cell / 2:g}" y="{y + scale.height - 8}" font-size="11" '
            f'text-anchor="middle" class="on">{label}</text>'
        )
    yield "</g>"


def _told(replica: _Replica, gpu: int, memory: GpuMemory) -> str:
    variant = replica.variant
    role = "" if variant.role == "whole" else f"{variant.role} "
    head = (
        f"GPU {gpu}: {variant.model}, {role}replica {replica.number} of {variant.replicas}\n"
        f"{variant.variant}, {variant.shape.precision}\n"
    )
    if not _computes(replica, gpu):
        host = variant.shape.host_memory_bytes / GIB
        return f"{head}holds nothing: taken for its share of the {host:.1f} GiB of host memory"
    return (
        f"{head}"
        f"weights {memory.weights_bytes / GIB:.1f} GiB, KV cache "
        f"{memory.kv_cache_bytes / GIB:.1f} GiB, of {memory.total_bytes / GIB:.1f} GiB"
    )


def _computes(replica: _Replica, gpu: int) -> bool:
    """Whether a GPU holds layers: llama.cpp may take more of them, for the node's memory."""
    shape = replica.variant.shape
    return shape.engine != "llamacpp" or sorted(replica.gpus).index(gpu) < shape.num_gpus


def _short(name: str, width: int) -> str:
    room = max(4, width // 6)
    return name if len(name) <= room else name[: room - 1] + "…"


def _rect(x: float, y: float, width: float, height: float, more: str, *, title: str = "") -> str:
    head = f'<rect x="{x:g}" y="{y:.6g}" width="{width:g}" height="{height:.4g}" {more}'
    return f"{head}><title>{escape(title)}</title></rect>" if title else f"{head}/>"


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int,
    quiet: bool = False,
    bold: bool = False,
    end: bool = False,
) -> str:
    more = ' class="quiet"' if quiet else ""
    more += ' font-weight="600"' if bold else ""
    more += ' text-anchor="end"' if end else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}"{more}>{escape(text)}</text>'
