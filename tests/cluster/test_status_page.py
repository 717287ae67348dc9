"""`bora status` of a large fleet: a glance, then what deserves a look, within 100 columns."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cluster.cli.status_page import status_page
from cluster.messages import FleetStatus, RankPlace, ReplicaStatus, VariantStatus

GIB = 2**30


def a_replica(number: int, **changes: object) -> ReplicaStatus:
    fields = {
        "replica": f"r{number:06d}x", "state": "ready", "stage": "", "age_s": 60.0 * number,
        "node": f"h100-node-{number % 7}", "gpus": (0, 1), "pid": 1, "url": "", "log_file": "",
        "log_tail": "", "running": 3, "waiting": 0, "kv_cache_usage": 0.4,
        "kv_cache_tokens": 120_321, "weights_bytes": 24 * GIB,
    }  # fmt: skip
    return ReplicaStatus.model_validate({**fields, **changes})


def a_variant(number: int, *replicas: ReplicaStatus, **changes: object) -> VariantStatus:
    ready = sum(replica.state == "ready" for replica in replicas)
    fields = {
        "model": f"mistral-small-{number}", "aliases": (), "engine": "vllm", "pool": "h100",
        "variant": f"mistral-small-{number}@h100-tp2-fp8", "ready": ready,
        "wanted": len(replicas), "min_replicas": 1, "max_replicas": 20, "in_flight": 33.2,
        "queued": 2, "planned_kv_cache_tokens": 122_064, "planned_weights_bytes": 23 * GIB,
        "replicas": replicas, "last_event": f"replica r{number}: ready", "last_event_s": 40.0,
        "gpu": "H100-SXM", "gpus_per_replica": 2,
    }  # fmt: skip
    return VariantStatus.model_validate({**fields, **changes})


def page(*variants: VariantStatus, width: int = 100, every_replica: bool = False) -> list[str]:
    status = FleetStatus(
        fleet="large", table_version=3, variants=variants, gateways=("g",), events=()
    )
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(status_page(status, now_s=100.0, every_replica=every_replica))
    return [line.rstrip() for line in console.export_text().splitlines()]


def large(*failing: int) -> list[VariantStatus]:
    """Twelve models of twenty replicas; the first ones of some models still start."""
    slow = {"state": "starting", "stage": "downloading weights, 12 % of 48.0 GiB"}
    return [
        a_variant(model, *(a_replica(n, **(slow if n == 0 and model in failing else {}))
                           for n in range(20)))
        for model in range(12)
    ]  # fmt: skip


def test_twelve_models_of_twenty_replicas_are_a_line_each_in_100_columns():
    lines = page(*large())

    assert lines[0] == "fleet large: 240/240 replicas ready, endpoint table 3, 1 gateway(s)"
    rows = [line for line in lines if "@h100-tp2-fp8" in line]
    assert len(rows) == 12
    assert rows[0].split() == [
        "mistral-small-0@h100-tp2-fp8", "20/20", "serving",
        *("40", "x", "H100-SXM,", "7", "nodes"), "23/24", "122k/120k", "33.2+2",
    ]  # fmt: skip
    assert len(lines) < 40
    assert max(map(len, lines)) <= 100
    assert "all serve; `bora status MODEL` shows all of a model" in "\n".join(lines)
    assert "mistral-small-0  60 s replica r0: ready" in lines


def test_of_many_replicas_those_are_listed_that_do_not_serve():
    text = "\n".join(lines := page(*large(3, 5), width=160))

    assert "2 of 240 replicas do not serve" in text
    listed = [line for line in lines if line.startswith("r000000x")]
    assert [line.split()[1] for line in listed] == ["mistral-small-3", "mistral-small-5"]
    assert "starting (downloading weights, 12 % of 48.0 GiB)" in listed[0]
    assert "19/20" in text
    assert "degraded" in text


def test_all_replicas_are_listed_of_few_or_when_asked_for():
    assert (
        sum(line.startswith("r0000") for line in page(a_variant(0, *map(a_replica, range(3))))) == 3
    )
    assert sum(line.startswith("r0000") for line in page(*large(), every_replica=True)) == 240


def test_a_replica_over_several_nodes_shows_each_and_counts_their_gpus():
    follower = RankPlace(node="h100-node-9", node_id="b", gpus=(2, 3))
    gang = a_replica(1, node="h100-node-8", followers=(follower,))

    text = "\n".join(page(a_variant(0, gang, gpus_per_replica=4), width=200))

    assert "4 x H100-SXM: h100-node-8 (2), h100-node-9 (2)" in text
    assert "h100-node-8 GPU 0,1 + h100-node-9 GPU 2,3" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"waiting": "a replica waits for 2 GPU"}, "mistral-small-0: a replica waits for 2 GPU"),
        ({"rollout": "1 of 3"}, "mistral-small-0: roll-out: 1 of 3"),
        ({"misplaced": ("r1 runs on c",)}, "mistral-small-0: not as planned: r1 runs on c"),
        ({"failure": "out of memory", "ready": 0}, "(`bora logs mistral-small-0`):"),
    ],
)
def test_what_is_not_as_wanted_stands_at_the_end_where_it_is_seen(
    changes: dict[str, object], said: str
):
    lines = page(a_variant(0, a_replica(1), **changes))

    assert said in "\n".join(lines[-2:])


def test_long_names_are_folded_and_never_cut():
    name = "mistral-large-3-675b-instruct-2512-nvfp4@pool-of-the-second-floor-tp8-pp2-ep-nvfp4"

    lines = page(a_variant(0, a_replica(1), variant=name))

    assert max(map(len, lines)) <= 100
    folded = [line.split(" ")[0] for line in lines[3:8]]
    assert name in "".join(folded)
