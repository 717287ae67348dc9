"""A plan as one page that needs nothing beside itself: picture, table, cost, reasons, changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from cluster.cli.plan_svg import GIB, STYLE, WIDTH, colours_of, drawing
from cluster.cli.render import beside_gpus, derived_demands, unpriced
from placement.explanation import Explanation, Reason
from placement.inventory import Inventory
from placement.migration import Create, Delete, Migration, Replace
from placement.plan import Plan, Variant

_GB = 1e9
_PAGE_STYLE = """
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 10px; }
.quiet { color: var(--quiet); } .bad { color: #d1242f; } .good { color: #1a7f37; }
@media (prefers-color-scheme: dark) { .bad { color: #ff7b72; } .good { color: #56d364; } }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 28px; }
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: 8px 14px; min-width: 90px; }
.tile b { display: block; font-size: 21px; font-weight: 600; }
.scroll { overflow-x: auto; } svg { display: block; width: 100%; min-width: 800px; max-width: 1120px; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th { text-align: left; font-weight: 600; color: var(--quiet); border-bottom: 1px solid var(--line); }
th, td { padding: 6px 12px 6px 0; vertical-align: top; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td { border-bottom: 1px solid var(--line); }
.words td { white-space: normal; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px; }
th:last-child, td:last-child { padding-right: 0; }
.use { display: inline-block; width: 44px; height: 8px; border-radius: 4px; background: var(--empty);
  overflow: hidden; margin-right: 8px; } .use i { display: block; height: 100%; background: #1f77b4; }
ul { padding-left: 20px; }
"""


_HOW_TO_READ = (
    "A box is a node, a bar in it the memory of a GPU. Bars that are joined are one replica; "
    "point at one for its numbers."
)


def plan_html(
    plan: Plan,
    inventory: Inventory,
    *,
    explanation: Explanation | None = None,
    moved: Migration | None = None,
) -> str:
    """The whole page."""
    picture, height = drawing(plan, inventory)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(plan.fleet)}: plan</title>",
        f"<style>{STYLE}{_PAGE_STYLE}</style></head><body><main>",
        *_head(plan),
        *_unmet(plan),
        "<h2>GPUs</h2>",
        f'<p class="quiet">{_HOW_TO_READ}</p>',
        '<div class="scroll">',
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="GPUs by node">{picture}</svg>',
        "</div>",
        *_variants(plan),
        *([] if moved is None else _changes(moved)),
        *([] if explanation is None else _reasons(explanation, plan.currency)),
        "</main></body></html>\n",
    ]
    return "\n".join(parts)


def _head(plan: Plan) -> Iterator[str]:
    tone = "bad" if plan.status == "infeasible" else "good"
    yield f"<h1>{escape(plan.fleet)}</h1>"
    yield f'<div class="quiet">plan: <span class="{tone}">{plan.status}</span></div>'
    yield '<div class="tiles">'
    yield _tile(f"{plan.cost_per_hour:,.2f}", f"{plan.currency} per hour")
    yield _tile(f"{plan.gpus_used:,} of {plan.gpus_total:,}", "GPUs used")
    yield _tile(str(sum(variant.replicas for variant in plan.variants)), "replicas")
    fullest = max((variant.predicted.utilization for variant in plan.variants), default=0.0)
    yield _tile(f"{100 * (1 - fullest):.0f} %", "least headroom")
    yield _tile(f"{100 * plan.gap:.2f} %", "gap to the best")
    if plan.robustness is not None:
        holds = plan.robustness.holds
        yield _tile("holds" if holds else "falls short", "if 15 % slower", bad=not holds)
    yield "</div>"
    for line in derived_demands(plan):
        yield f'<p class="quiet">{escape(line)}.</p>'
    if plan.unpriced:
        words = unpriced(plan)
        yield f'<p class="quiet">{escape(words[:1].upper() + words[1:])}.</p>'
    if plan.node_loss is not None:
        words = plan.node_loss.in_words
        yield f'<p class="quiet">{escape(words[:1].upper() + words[1:])}.</p>'
    if plan.robustness is not None and plan.robustness.short:
        short = escape(", ".join(plan.robustness.short))
        dearer = plan.robustness.objective_to_hold
        more = "" if dearer is None else f"; objective of a plan that holds: {dearer:,.2f}"
        yield f'<p class="quiet">Short if engines are slower than predicted: {short}{more}.</p>'


def _tile(value: str, label: str, *, bad: bool = False) -> str:
    tone = ' class="bad"' if bad else ""
    return (
        f'<div class="tile"><b{tone}>{escape(value)}</b>'
        f'<span class="quiet">{escape(label)}</span></div>'
    )


def _unmet(plan: Plan) -> Iterator[str]:
    if not plan.unmet:
        return
    yield "<h2>Not possible</h2><ul>"
    for entry in plan.unmet:
        yield (
            f'<li><b>{escape(entry.model)}</b>: <span class="bad">{escape(entry.constraint)}</span>'
            f"<br>cheapest way out: {escape(entry.cheapest_relaxation)}</li>"
        )
    yield "</ul>"


def _variants(plan: Plan) -> Iterator[str]:
    colours = colours_of(plan)
    yield "<h2>Plan</h2>"
    columns = (
        "model", "pool", "checkpoint", "#replicas", "#GPUs each", "#context", "#KV tokens",
        "#requests/s", "used", "#TTFT p95", "#TPOT p95", f"#{plan.currency}/h",
    )  # fmt: skip
    rows = [_variant_row(variant, colours[variant.model]) for variant in plan.variants]
    yield _table(columns, rows)


def _variant_row(variant: Variant, colour: str) -> tuple[str, ...]:
    shape, used = variant.shape, variant.predicted.utilization
    weights = f"{shape.per_gpu.weights_bytes / GIB:.1f} GiB/GPU{beside_gpus(variant)}"
    bar = f'<span class="use"><i style="width: {100 * min(used, 1.0):.0f}%"></i></span>'
    rate = variant.capacity_requests_per_s * variant.replicas
    role = "" if variant.role == "whole" else f' <span class="quiet">{variant.role}</span>'
    return (
        f'<span class="dot" style="background: {colour}"></span>{escape(variant.model)}{role}',
        escape(" and ".join(dict.fromkeys(variant.pools))),
        f"{escape(shape.precision)}, {weights}",
        str(variant.replicas),
        escape(variant.hardware),
        f"{shape.max_model_len:,}",
        f"{shape.kv_cache_tokens:,}",
        f"{rate:.3g}",
        f"{bar}{100 * used:.0f} %",
        f"{variant.predicted.ttft_p95_s:.2f} s",
        f"{variant.predicted.tpot_p95_ms:.1f} ms",
        f"{variant.price_per_hour:.2f}",
    )


def _changes(moved: Migration) -> Iterator[str]:
    yield "<h2>What changes</h2>"
    if not moved.changes:
        yield '<p class="quiet">Nothing.</p>'
        return
    cost = moved.cost_per_hour_after - moved.cost_per_hour_before
    yield (
        f'<p class="quiet">{moved.bytes_to_load / _GB:.1f} GB to load, about '
        f"{moved.duration_s:.0f} s, reduced capacity for {moved.reduced_capacity_s:.0f} s, "
        f"{cost:+.2f} {escape(moved.currency)}/h</p>"
    )
    rows = []
    for change in moved.changes:
        if isinstance(change, Create):
            replicas = f"+{change.replicas}"
        elif isinstance(change, Delete):
            replicas = f"-{change.replicas}"
        elif isinstance(change, Replace):
            replicas = f"{change.replicas}: {escape(change.why)}"
        else:
            replicas = f"{change.before} -> {change.after}"
        rows.append(
            (
                change.kind,
                escape(change.variant),
                replicas,
                f"{change.bytes_to_load / _GB:.1f}",
                f"{change.load_s:.0f} s",
                f"{change.reduced_capacity_s:.0f} s",
            )
        )
    yield _table(("", "variant", "replicas", "#GB", "#serves after", "#reduced for"), rows)


def _reasons(explanation: Explanation, currency: str) -> Iterator[str]:
    yield "<h2>Why</h2>"
    rows = []
    for reason in explanation.reasons:
        runner_up = "-"
        if reason.runner_up is not None:
            runner_up = escape(reason.runner_up)
            runner_up += f" ({reason.runner_up_costs or 0.0:+.2f} {escape(currency)}/h)"
        chosen = "<br>".join(map(escape, reason.chosen))
        limit = "<br>".join(map(escape, filter(None, (reason.binding, _roles(reason)))))
        rows.append((escape(reason.model), chosen, runner_up, limit))
    yield f'<div class="words">{_table(("model", "chosen", "runner-up", "limit"), rows)}</div>'
    yield from _list("What if", [f"{each.change}: {each.effect}" for each in explanation.what_if])
    ways = [
        f"{way.change}: then {way.cost_per_hour:.2f} {currency}/h" for way in explanation.ways_out
    ]
    yield from _list("Ways out, each enough alone", ways)


def _roles(reason: Reason) -> str:
    return "" if reason.roles is None else f"prefill and decode apart: {reason.roles}"


def _list(title: str, entries: Sequence[str]) -> Iterator[str]:
    if entries:
        items = "".join(f"<li>{escape(entry)}</li>" for entry in entries)
        yield f"<h2>{escape(title)}</h2><ul>{items}</ul>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already; a column whose name begins with # holds numbers."""
    kinds = [' class="number"' if name.startswith("#") else "" for name in columns]
    head = "".join(
        f"<th{kind}>{escape(name.lstrip('#'))}</th>"
        for kind, name in zip(kinds, columns, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
