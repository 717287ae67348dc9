"""Plans as pages: what is drawn, and that a page needs nothing beside itself."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from cluster.cli.plan_html import plan_html
from cluster.cli.plan_pages import explanation_page, migration_page
from cluster.cli.plan_svg import plan_svg
from cluster.cli.render import derived_demands, plan_page
from placement.catalogue import CONFIGS
from placement.changes import migration
from placement.explain import explain
from placement.fleet import Demand, FleetSpec, ReplicaBounds
from placement.inventory import Inventory
from placement.plan import Plan, Robustness
from placement.planner import make_plan
from placement.spec import load_yaml
from tests.placement.builders import CATALOGUE, a_fleet, a_pool, a_wish, an_inventory

SVG = "{http://www.w3.org/2000/svg}"


def a_case(nodes: int = 2, rate: float = 30.0) -> tuple[FleetSpec, Inventory, Plan]:
    wish = a_wish(
        "chat", "mistral-small-3.2", demand=Demand(requests_per_s=rate),
        replicas=ReplicaBounds(max=8), tensor_parallel_size=2, max_model_len=8192,
    )  # fmt: skip
    fleet, inventory = a_fleet(wish), an_inventory(a_pool(nodes=nodes))
    return fleet, inventory, make_plan(fleet, inventory, CATALOGUE)


@pytest.mark.parametrize("nodes", [1, 8, 125, 400])
def test_every_gpu_is_drawn_within_the_picture(nodes: int) -> None:
    _, inventory, plan = a_case(nodes)

    root = ET.fromstring(plan_svg(plan, inventory))  # noqa: S314 - our own text
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    width, height = (float(size) for size in root.attrib["viewBox"].split()[2:])

    assert sum(title.startswith("GPU ") for title in titles) == nodes * 8
    assert sum(": chat, replica" in title for title in titles) == plan.gpus_used
    for rect in root.iter(f"{SVG}rect"):
        assert 0 <= float(rect.get("x", 0)) <= width - float(rect.attrib["width"])
        assert 0 <= float(rect.get("y", 0)) <= height - float(rect.attrib["height"])


def test_sixty_nodes_are_named_in_the_picture() -> None:
    names = [f"team-{number}" for number in range(12)]
    wishes = [
        a_wish(name, "mistral-7b", demand=Demand(requests_per_s=9.0), replicas=ReplicaBounds(max=4))
        for name in names
    ]
    inventory = an_inventory(a_pool("a", nodes=30), a_pool("b", "RTX-4090", nodes=30))

    picture = plan_svg(make_plan(a_fleet(*wishes), inventory, CATALOGUE), inventory)
    texts = {text.text for text in ET.fromstring(picture).iter(f"{SVG}text")}  # noqa: S314 - ours

    assert texts >= {node for pool in inventory.pools for node in pool.names()}
    assert texts >= set(names)


def test_the_page_needs_nothing_beside_itself_and_tells_cost_reasons_and_changes() -> None:
    fleet, inventory, plan = a_case()
    before = a_case(rate=4.0)[2]

    page = plan_html(
        plan,
        inventory,
        explanation=explain(fleet, inventory, CATALOGUE, plan),
        moved=migration(before, plan),
    )

    assert not re.search(r"<script|<link|src=|https?://|@import", page)
    assert f"{plan.cost_per_hour:,.2f}" in page
    assert "prefers-color-scheme: dark" in page
    for heading in ("GPUs", "Plan", "What changes", "Why"):
        assert f"<h2>{heading}</h2>" in page


def test_a_demand_that_nobody_wrote_down_is_told_with_its_source() -> None:
    written = a_case()[2]
    demand = written.demands["chat"].model_copy(update={"source": "from <day>.csv: 9 requests"})
    derived = written.model_copy(update={"demands": {"chat": demand}})
    line = (
        "chat is planned for 30 requests/s, prompts of 512 tokens, answers of 128; from <day>.csv"
    )

    assert derived_demands(written) == []
    assert derived_demands(derived) == [f"{line}: 9 requests"]
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(plan_page(derived))
    assert line in console.export_text()
    assert line.replace("<day>", "&lt;day&gt;") in plan_html(derived, a_case()[1])


def test_a_replica_on_many_nodes_is_drawn_on_all_of_them_and_told_by_its_pools() -> None:
    folder = CONFIGS / "fleets"
    fleet = load_yaml(folder / "small-boxes.yaml", FleetSpec)
    inventory = load_yaml(folder / "small-boxes.inventory.yaml", Inventory)
    plan = make_plan(fleet, inventory, CATALOGUE)
    console = Console(width=400, record=True, file=io.StringIO())

    page = plan_html(plan, inventory, moved=migration(Plan.empty(), plan))
    console.print(plan_page(plan))
    table = console.export_text()

    for variant in plan.variants:
        (replica,) = variant.placement
        assert page.count(f": {variant.model}, replica") == sum(len(node.gpus) for node in replica)
        assert " and ".join(dict.fromkeys(variant.pools)) in page
        assert variant.hardware in page
        assert variant.hardware in table
        assert all(node.node in table for node in replica)


def test_what_is_not_possible_stands_on_the_page_with_the_way_out() -> None:
    _, inventory, plan = a_case(nodes=1, rate=500.0)

    page = plan_html(plan, inventory)

    assert plan.status == "infeasible"
    assert plan.unmet[0].cheapest_relaxation in page


def test_an_example_is_printed_with_its_variants_prices_and_places() -> None:
    folder = CONFIGS / "fleets"
    fleet = load_yaml(folder / "large-3-a100.yaml", FleetSpec)
    inventory = load_yaml(folder / "large-3-a100.inventory.yaml", Inventory)
    console = Console(width=200, record=True, file=io.StringIO())

    console.print(plan_page(make_plan(fleet, inventory, CATALOGUE)))
    head, columns, row = console.export_text().strip().splitlines()

    assert head == "fleet large-3-a100: optimal, 8 of 8 GPUs, 14.32 USD/h"
    assert columns.split()[:3] == ["model", "variant", "replicas"]
    assert row.split()[:7] == ["large", "large@a100-tp8-ep", "1", "(1-1)", "8", "x", "A100-80-SXM"]
    assert "a100-0" in row


def test_a_plan_that_hangs_on_predictions_says_so() -> None:
    slow = Robustness(holds=False, short=("chat",), objective_to_hold=99.0)
    plan = a_case()[2].model_copy(update={"robustness": slow})
    console = Console(width=200, record=True, file=io.StringIO())

    console.print(plan_page(plan))

    assert "15 % slower than predicted chat would go short" in console.export_text()


def test_names_do_not_become_markup() -> None:
    _, inventory, plan = a_case()
    odd = plan.model_copy(update={"fleet": "<b>&"})

    assert "<b>&" not in plan_html(odd, inventory)
    assert "<b>&" not in plan_svg(odd, inventory)


def test_experts_in_host_memory_are_told_and_gpus_taken_for_it_are_drawn_empty() -> None:
    wish = a_wish(
        "large", "mistral-large-3-675b-2512", engine="llamacpp", precision=("q4_k_m",),
        max_model_len=8192,
    )  # fmt: skip
    inventory = an_inventory(a_pool("p", "RTX-4090", gpus_per_node=4, host_memory_gib=512))
    fleet = a_fleet(wish)
    plan = make_plan(fleet, inventory, CATALOGUE)

    root = ET.fromstring(plan_svg(plan, inventory))  # noqa: S314 - our own text
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    text = io.StringIO()
    Console(file=text, width=200).print(plan_page(plan))

    [variant] = plan.variants
    empty = [title for title in titles if "holds nothing: taken for its share" in title]
    assert len(empty) == variant.gpus_per_replica - variant.shape.num_gpus > 0
    host = f" + {variant.shape.host_memory_bytes / 2**30:.1f} GiB host"
    assert host in text.getvalue()
    assert host in plan_html(plan, inventory)
    assert f"{variant.gpus_per_replica} x RTX-4090" in text.getvalue()


def test_prefill_and_decode_replicas_are_told_apart_on_every_page() -> None:
    folder = CONFIGS / "fleets"
    fleet = load_yaml(folder / "prefill-decode.yaml", FleetSpec)
    inventory = load_yaml(folder / "prefill-decode.inventory.yaml", Inventory)
    plan = make_plan(fleet, inventory, CATALOGUE)
    reasons = explain(fleet, inventory, CATALOGUE, plan)
    console = Console(width=250, record=True, file=io.StringIO())

    console.print(plan_page(plan))
    console.print(explanation_page(reasons, plan.currency))
    console.print(migration_page(migration(Plan.empty(), plan)))
    page = plan_html(plan, inventory, explanation=reasons)
    root = ET.fromstring(plan_svg(plan, inventory))  # noqa: S314 - our own text
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    labels = {label.text for label in root.iter(f"{SVG}text")}

    text = console.export_text()
    for name in ("documents@a100-tp8-decode", "documents@h100-tp4-prefill"):
        assert text.count(name) >= 2  # of the plan and of what changes
    assert "  roles      a prefill replica reads 5.09 prompts/s" in text
    assert '<span class="quiet">prefill</span>' in page
    assert "prefill and decode apart: a prefill replica reads" in page
    assert sum(": documents, prefill replica 2 of 2" in title for title in titles) == 4
    assert sum(": documents, decode replica 1 of 1" in title for title in titles) == 8
    assert {"P1", "P2", "D1"} <= labels
