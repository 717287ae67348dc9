"""Which commit of a repository a plan means."""

from __future__ import annotations

from cluster.errors import HubUnreachable, WeightsMissing
from cluster.models import pinned
from cluster.shape_version import shape_version
from placement.changes import Replace, migration
from placement.model_cache import ModelCacheSpec
from placement.plan import Variant
from tests.builders import a_plan, a_shape, a_variant

FIRST, SECOND = "1" * 40, "2" * 40


class Commits:
    """A hub that says what it is told to."""

    def __init__(self, answer: str | Exception) -> None:
        self.answer = answer
        self.asked: list[tuple[str, str]] = []

    def commit(self, repo: str, revision: str) -> str:
        self.asked.append((repo, revision))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def served(**changes) -> Variant:
    fields = {"checkpoint": "someone/Model", "shape": a_shape(engine="vllm")}
    return a_variant(**{**fields, **changes})


def test_a_branch_becomes_the_commit_that_it_is_now():
    hub = Commits(FIRST)

    plan = pinned(a_plan(served(), served(variant="chat@other", revision="v2")), hub=hub)

    assert [variant.commit for variant in plan.variants] == [FIRST, FIRST]
    assert sorted(hub.asked) == [("someone/Model", "main"), ("someone/Model", "v2")]


def test_nobody_asks_about_what_is_not_downloaded_or_a_commit_already():
    hub = Commits(FIRST)
    simulated, made = a_variant(checkpoint="someone/Model"), served(checkpoint="nano:nano-7b")
    offline = served(model_cache=ModelCacheSpec(offline=True))

    plan = pinned(a_plan(simulated, made, offline, served(revision=SECOND)), hub=hub)

    assert [variant.commit for variant in plan.variants] == ["", "", "", SECOND]
    assert hub.asked == []


def test_without_a_hub_what_runs_stays_what_it_is():
    running = a_plan(served(commit=FIRST))

    plan = pinned(a_plan(served()), running, Commits(HubUnreachable("gone")))

    assert plan.variants[0].commit == FIRST
    assert shape_version(plan.variants[0]) == shape_version(running.variants[0])


def test_what_the_hub_does_not_show_us_is_left_to_the_nodes():
    plan = pinned(a_plan(served()), hub=Commits(WeightsMissing("gated")))

    assert plan.variants[0].commit == ""


def test_another_commit_is_another_engine():
    running = a_plan(served(commit=FIRST))

    plan = pinned(a_plan(served()), running, Commits(SECOND))

    assert shape_version(plan.variants[0]) != shape_version(running.variants[0])
    [change] = migration(running, plan).changes
    assert isinstance(change, Replace)
    assert change.why == f"commit {FIRST[:12]} -> {SECOND[:12]}"


def test_adapters_of_a_repository_are_fixed_to_its_commit_and_folders_stay_folders():
    hub = Commits(FIRST)
    adapters = {"a": "acme/a", "b": "acme/b@v2", "c": "/srv/c", "d": f"acme/d@{SECOND}"}

    plan = pinned(a_plan(a_variant(adapters=adapters)), hub=hub)

    assert plan.variants[0].adapters == {
        "a": f"acme/a@{FIRST}",
        "b": f"acme/b@{FIRST}",
        "c": "/srv/c",
        "d": f"acme/d@{SECOND}",
    }
    assert sorted(hub.asked) == [("acme/a", "main"), ("acme/b", "v2")]


def test_without_a_hub_adapters_stay_what_they_are():
    running = a_plan(a_variant(adapters={"a": f"acme/a@{FIRST}"}))
    wanted = a_plan(a_variant(adapters={"a": "acme/a", "b": "acme/b"}))

    plan = pinned(wanted, running, Commits(HubUnreachable("gone")))

    assert plan.variants[0].adapters == {"a": f"acme/a@{FIRST}", "b": "acme/b"}


def test_of_an_offline_fleet_no_hub_is_asked_about_adapters():
    hub = Commits(FIRST)
    offline = a_variant(adapters={"a": "acme/a"}, model_cache=ModelCacheSpec(offline=True))

    assert pinned(a_plan(offline), hub=hub).variants[0].adapters == {"a": "acme/a"}
    assert hub.asked == []
