"""From an engine's metrics to the next plan's predictions, without Ray and without engines."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.calibration_file import load_calibration
from cluster.cli.status_page import status_page
from cluster.engines import vllm_output
from cluster.engines.adapter import EngineLoad
from cluster.engines.llamacpp import LlamacppEngine
from cluster.engines.sim import SimEngine
from cluster.engines.sim_api import CompletionRequest, generation_of
from cluster.engines.sim_options import parse_options
from cluster.engines.sim_server import SimulatedEngine
from cluster.engines.sim_settings import settings_of
from cluster.event_log import EventLog
from cluster.generations import key_of
from cluster.messages import FleetStatus, ReplicaReport, SpeedStatus, VariantStatus
from cluster.observer import Observer
from cluster.shape_version import shape_version
from cluster.speed_meter import SpeedMeter
from cluster.speed_watch import SpeedWatch
from placement.calibration import Calibration
from placement.catalogue import load_catalogue
from placement.fleet import FleetModel, FleetSpec
from placement.inventory import Inventory, Pool
from placement.performance import Load, latency_s
from placement.plan import Variant
from placement.planner import make_plan
from placement.spec import dump_yaml, parse_yaml
from placement.speed_comparison import WINDOWS, compare
from placement.speed_window import Sample, SpeedWindow, flaw
from tests.builders import a_report
from tests.gateway.virtual_time import run_in_virtual_time
from tests.placement.speed_windows import a_window, samples_of

CATALOGUE = load_catalogue()
POOL = Pool(name="h100", gpu="H100-SXM", gpus_per_node=8)
LOAD = Load(12, 900, 120, prefix_hit=0.25)

# As vLLM 0.32 tells it; another data parallel rank counts for itself.
PAGE = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="chat"}} {running}
vllm:num_requests_waiting{{engine="0",model_name="chat"}} 0.0
vllm:num_requests_waiting_by_reason{{engine="0",model_name="chat",reason="capacity"}} 9.0
vllm:kv_cache_usage_perc{{engine="0",model_name="chat"}} 0.25
vllm:prefix_cache_queries_total{{engine="0",model_name="chat"}} {prompt_tokens}
vllm:prefix_cache_hits_total{{engine="0",model_name="chat"}} {cached_tokens}
vllm:prefix_cache_hits_created{{engine="0",model_name="chat"}} 1.78e+09
vllm:external_prefix_cache_hits_total{{engine="0",model_name="chat"}} 0.0
vllm:num_preemptions_total{{engine="0",model_name="chat"}} 0.0
vllm:prompt_tokens_total{{engine="0",model_name="chat"}} {prompt_tokens}
vllm:prompt_tokens_by_source_total{{engine="0",model_name="chat",source="local_compute"}} 9.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.1",model_name="chat"}} 7.0
vllm:time_to_first_token_seconds_count{{engine="0",model_name="chat"}} {prompts}
vllm:time_to_first_token_seconds_sum{{engine="0",model_name="chat"}} {ttft_s}
vllm:inter_token_latency_seconds_bucket{{engine="0",le="0.01",model_name="chat"}} 7.0
vllm:inter_token_latency_seconds_count{{engine="0",model_name="chat"}} {intervals}
vllm:inter_token_latency_seconds_sum{{engine="0",model_name="chat"}} {intervals_s}
"""


def page_of(sample: Sample) -> str:
    names = ("prompts", "ttft_s", "prompt_tokens", "cached_tokens", "intervals", "intervals_s")
    told = {name: getattr(sample.counters, name) for name in names}
    return PAGE.format(running=float(sample.running), **told)


def planned(calibration: Calibration | None = None, **changes: Any) -> Variant:
    wish = {"name": "chat", "model": "mistral-small-3.2-24b-2506", "precision": ("fp8",), **changes}
    fleet = FleetSpec(fleet="x", models=(FleetModel(**wish),))
    catalogue = CATALOGUE.with_calibration(calibration or Calibration())
    [variant] = make_plan(fleet, Inventory(pools=(POOL,)), catalogue).variants
    return variant


def measured_pages(
    variant: Variant, *, factor: float, seconds: float
) -> Iterator[tuple[float, str]]:
    """Half a second apart, of an engine that is `factor` times as slow as the model predicts."""
    assert variant.speed is not None
    costs = replace(variant.speed.costs, ttft_factor=1.0, tpot_factor=1.0)
    ttft_s, tpot_s = (factor * each for each in latency_s(costs, LOAD))
    for sample in samples_of(LOAD, ttft_s=ttft_s, tpot_s=tpot_s, seconds=seconds):
        yield sample.at_s, page_of(sample)


def heartbeats(
    variant: Variant, *, factor: float, seconds: float, started_s: float
) -> Iterator[str]:
    """What a replica sends, as JSON."""
    meter = SpeedMeter()
    for at_s, page in measured_pages(variant, factor=factor, seconds=seconds):
        meter.note(vllm_output.load(page), at_s)
        yield a_report(
            model=variant.model,
            variant=variant.variant,
            version=shape_version(variant),
            started_s=started_s,
            speed=meter.window,
        ).model_dump_json()


def an_observer(folder: Path, *variants: Variant) -> tuple[Observer, EventLog]:
    events = EventLog(folder / "events.jsonl")
    observer = Observer(folder / "calibration.yaml", events)
    observer.adopt(variants)
    return observer, events


async def play(
    observer: Observer, variant: Variant, *, factor: float, seconds: float, started_s: float = 1.0
) -> None:
    told = heartbeats(variant, factor=factor, seconds=seconds, started_s=started_s)
    for text in told:
        await observer.heard(ReplicaReport.model_validate_json(text))


def test_vllms_page_is_read_to_its_totals_and_summed_over_ranks() -> None:
    sample = samples_of(LOAD, ttft_s=0.5, tpot_s=0.02)[-1]
    page = page_of(sample)

    one = vllm_output.load(page).counters
    two = vllm_output.load(page + page.replace('engine="0"', 'engine="1"')).counters

    assert one == sample.counters
    assert two is not None
    assert two.prompts == 2 * sample.counters.prompts
    assert vllm_output.load("vllm:num_requests_running 1.0\n").counters is None


@pytest.mark.parametrize("engine", ["vllm", "sim", "llamacpp"])
def test_what_predictions_follow_from_is_kept_with_the_plan(engine: str) -> None:
    """On disk, and in what Serve is told."""
    variant = on_llamacpp(Calibration()) if engine == "llamacpp" else planned(engine=engine)

    assert variant.speed is not None
    assert variant.speed.setup.engine == engine
    assert parse_yaml(dump_yaml(variant), Variant, source="plan.yaml") == variant
    assert Variant.model_validate(variant.model_dump(mode="json")) == variant


async def test_a_slow_engine_makes_the_next_plan_slower(tmp_path: Path) -> None:
    variant = planned()
    observer, events = an_observer(tmp_path, variant)

    # One window to warm up, and measurements of five.
    await play(observer, variant, factor=1.5, seconds=20.5 * (1 + 4 * WINDOWS))

    calibration = load_calibration(tmp_path / "calibration.yaml")
    [seen] = calibration.speeds
    assert seen.tpot.count == 4
    assert math.exp(seen.tpot.mean) == pytest.approx(1.5, rel=0.01)
    again = planned(calibration)
    before, after = variant.shape.prediction, again.shape.prediction
    factor, error = seen.tpot.corrected(before.tpot_error or 0)
    assert again.shape.tensor_parallel_size == variant.shape.tensor_parallel_size
    assert after.tpot_ms == pytest.approx(factor * before.tpot_ms)
    assert 1.4 < factor < 1.5
    assert after.tpot_error == error < (before.tpot_error or 0)
    assert again.capacity_requests_per_s < variant.capacity_requests_per_s
    assert shape_version(again) == shape_version(variant)  # engines run on
    [event] = [event for event in events if event.kind == "calibration"]
    assert "time per token is 50 % above predicted, which may be wrong by 6 %" in event.text


async def test_a_corrected_plan_is_no_surprise_and_changes_no_ratio(tmp_path: Path) -> None:
    observer, events = an_observer(tmp_path, planned())
    for start in range(1, 7):
        variant = planned(load_calibration(tmp_path / "calibration.yaml"))
        observer.adopt([variant])
        seconds = 20.5 * (1 + WINDOWS)
        await play(observer, variant, factor=1.3, seconds=seconds, started_s=start)

    [seen] = load_calibration(tmp_path / "calibration.yaml").speeds
    assert math.exp(seen.tpot.mean) == pytest.approx(1.3, rel=0.01)
    assert len([event for event in events if event.kind == "calibration"]) == 1
    status = observer.speed(planned(load_calibration(tmp_path / "calibration.yaml")))
    assert status is not None
    assert status.last is not None
    assert status.last.observed_tpot_ms == pytest.approx(status.last.predicted_tpot_ms, rel=0.02)


async def test_a_damaged_calibration_file_is_left_as_it_is(tmp_path: Path) -> None:
    variant = planned()
    observer, _ = an_observer(tmp_path, variant)
    (tmp_path / "calibration.yaml").write_text("speeds: 7")

    await play(observer, variant, factor=1.5, seconds=20.5 * (1 + WINDOWS))

    assert (tmp_path / "calibration.yaml").read_text() == "speeds: 7"


async def test_a_simulated_engine_is_compared_but_never_kept(tmp_path: Path) -> None:
    variant = planned(engine="sim")
    observer, events = an_observer(tmp_path, variant)

    await play(observer, variant, factor=0.05, seconds=20.5 * (1 + WINDOWS))

    assert not (tmp_path / "calibration.yaml").exists()
    assert list(events) == []
    status = observer.speed(variant)
    assert status is not None
    assert status.windows == WINDOWS


def a_heartbeat(variant: Variant, number: int, **changes: Any) -> ReplicaReport:
    """With a good window."""
    assert variant.speed is not None
    told = {
        "replica": "r1",
        "model": variant.model,
        "variant": variant.variant,
        "version": shape_version(variant),
        "speed": a_window(variant.speed, number=number),
    }
    return a_report(**{**told, **changes})


def heard(watch: SpeedWatch, variant: Variant, *reports: ReplicaReport, now_s: float = 1e6) -> int:
    """How many windows of these count."""
    watch.adopt([variant])
    for report in reports:
        watch.heard(report, {key_of(variant): variant}, now_s)
    status = watch.status(variant)
    return status.windows if status else 0


def test_a_window_counts_once_however_often_it_is_sent() -> None:
    variant = planned()
    one, two = (a_heartbeat(variant, number) for number in (1, 2))

    assert heard(SpeedWatch(), variant, one, one, two, one, two) == 2


def test_windows_of_a_restarted_engine_are_told_from_those_before() -> None:
    variant = planned()

    restarted = a_heartbeat(variant, 1, started_s=200.0)
    assert heard(SpeedWatch(), variant, a_heartbeat(variant, 2), restarted) == 2


@pytest.mark.parametrize("state", ["starting", "unhealthy", "draining", "failed"])
def test_a_replica_that_does_not_serve_is_not_measured(state: str) -> None:
    variant = planned()

    assert heard(SpeedWatch(), variant, a_heartbeat(variant, 1, state=state)) == 0


def test_a_window_in_which_streams_may_have_moved_does_not_count() -> None:
    variant, watch = planned(), SpeedWatch()
    watch.adopt([variant])
    watch.changed(variant.model, 100.0)

    assert heard(watch, variant, a_heartbeat(variant, 1), now_s=119.0) == 0
    assert "came or went" in getattr(watch.status(variant), "not_counted", "")
    assert heard(watch, variant, a_heartbeat(variant, 2), now_s=120.5) == 1


def test_another_shape_of_the_variant_and_half_of_requests_work_do_not_count() -> None:
    variant = planned()
    half = variant.model_copy(update={"role": "decode"})

    assert heard(SpeedWatch(), variant, a_heartbeat(variant, 1, version="old")) == 0
    assert heard(SpeedWatch(), half, a_heartbeat(half, 1)) == 0


def test_an_overloaded_window_is_shown_as_not_compared() -> None:
    variant, watch = planned(), SpeedWatch()
    assert variant.speed is not None
    waiting = a_window(variant.speed, waiting=30.0)

    assert heard(watch, variant, a_heartbeat(variant, 1, speed=waiting)) == 0
    assert "not compared: overloaded: 30.0 requests waited on average" in shown(
        watch.status(variant)
    )


def test_status_shows_predicted_and_observed_with_error_bars() -> None:
    variant, watch = planned(), SpeedWatch()
    assert variant.speed is not None
    heard(watch, variant, a_heartbeat(variant, 1, speed=a_window(variant.speed, tpot=1.25)))
    status = watch.status(variant)
    assert status is not None
    assert status.last is not None

    assert status.last.observed_tpot_ms == pytest.approx(1.25 * status.last.predicted_tpot_ms)
    line = shown(status)
    assert f"TPOT {status.last.predicted_tpot_ms:.3g} ±6% / " in line
    assert f"{status.last.observed_tpot_ms:.3g} ms, TTFT" in line


def shown(speed: SpeedStatus | None) -> str:
    """What `bora status` prints, in one line."""
    variant = VariantStatus(
        model="chat", aliases=(), variant="chat@h100-tp1", engine="vllm", pool="h100", ready=1,
        wanted=1, min_replicas=1, max_replicas=1, in_flight=0, queued=0, planned_kv_cache_tokens=1,
        planned_weights_bytes=1, replicas=(), last_event="", speed=speed,
    )  # fmt: skip
    status = FleetStatus(
        fleet="t", table_version=1, variants=(variant,), gateways=("g",), events=()
    )
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(status_page(status))
    return " ".join(console.export_text().replace("plan/actual", "").split())


def noted(meter: SpeedMeter, samples: list[Sample]) -> SpeedWindow | None:
    for sample in samples:
        meter.note(
            EngineLoad(sample.running, sample.waiting, 0.0, counters=sample.counters), sample.at_s
        )
    return meter.window


def test_the_first_window_is_a_warm_up_and_is_not_told() -> None:
    meter = SpeedMeter()

    assert noted(meter, samples_of(LOAD, ttft_s=0.5, tpot_s=0.02, seconds=30)) is None
    window = noted(SpeedMeter(), samples_of(LOAD, ttft_s=0.5, tpot_s=0.02, seconds=41))
    assert window is not None
    assert window.number == 1
    assert window.duration_s == pytest.approx(20.0)


def test_counters_that_fall_begin_a_new_window() -> None:
    """What a restarted engine counted is not taken for a difference."""
    meter = SpeedMeter()
    noted(meter, samples_of(LOAD, ttft_s=0.5, tpot_s=0.02, seconds=50))
    number = meter.window.number if meter.window else 0

    after = samples_of(LOAD, ttft_s=0.9, tpot_s=0.05, seconds=25, began_s=1050.5)
    window = noted(meter, after)

    assert window is not None
    assert window.number == number + 1
    assert window.tpot_s == pytest.approx(0.05)


def test_a_gap_and_an_interruption_begin_a_new_window() -> None:
    early = samples_of(LOAD, ttft_s=0.5, tpot_s=0.02, seconds=15)
    gap, interrupted = SpeedMeter(), SpeedMeter()
    noted(gap, early)
    noted(interrupted, early)
    interrupted.interrupt()

    rest = samples_of(LOAD, ttft_s=0.5, tpot_s=0.02, seconds=19, begin=early[-1].counters)
    later = [replace(sample, at_s=sample.at_s + 40) for sample in rest]

    assert noted(gap, later) is None
    assert noted(interrupted, [replace(sample, at_s=sample.at_s + 15) for sample in rest]) is None


def test_an_engine_that_does_not_answer_is_not_taken_to_stand_still() -> None:
    """Its last words stay: they are not noted again as if it had said them now."""
    meter = SpeedMeter()
    [*early, last] = samples_of(LOAD, ttft_s=0.5, tpot_s=0.02, seconds=30)
    noted(meter, early)
    told = EngineLoad(last.running, last.waiting, 0.0, counters=last.counters)
    for number in range(600):
        meter.note(told, last.at_s + number / 2)

    assert meter.window is None


def test_a_window_begins_with_the_load_and_not_in_the_idle_time_before() -> None:
    busy = samples_of(LOAD, ttft_s=0.5, tpot_s=0.02, seconds=45)
    idle = [
        replace(busy[0], at_s=busy[0].at_s - 200 + number / 2, running=0) for number in range(400)
    ]

    window = noted(SpeedMeter(), [*idle, *busy])

    assert window is not None
    assert window.drift == 0


def test_a_few_requests_are_gathered_for_minutes_and_then_told_as_too_few() -> None:
    lonely = Load(1, 900, 120)
    slow = samples_of(lonely, ttft_s=5.0, tpot_s=0.3, seconds=900)

    window = noted(SpeedMeter(), slow)

    assert window is not None
    assert window.duration_s == pytest.approx(300.0)
    assert window.prompts < 20


@pytest.mark.parametrize("speed", [0.5, 1.0, 4.0])
def test_a_simulated_engine_is_found_to_be_as_fast_as_it_was_set(speed: float) -> None:
    """The whole engine in virtual time: one user after another, each asks again when answered."""
    variant = planned(engine="sim", engine_args=(f"--sim-speed={speed}",))

    window = run_in_virtual_time(_simulated(variant))

    assert variant.speed is not None
    compared = compare(variant.speed, window)
    assert compared.tpot_ratio == pytest.approx(1 / speed, rel=0.03)
    assert compared.ttft_ratio == pytest.approx(1 / speed, rel=0.03)


async def _simulated(variant: Variant) -> SpeedWindow:
    """Its second window."""
    launch = SimEngine().launch(variant, checkpoint="", host="", port=0, api_key="")
    settings = settings_of(parse_options(launch.command[3:]), "")
    engine, meter = SimulatedEngine(settings), SpeedMeter()
    body = CompletionRequest(prompt=(7,) * 512, max_tokens=128, ignore_eos=True)

    async def user() -> None:
        while True:
            generation = generation_of(body, settings.limits)
            engine.begin(generation)
            await engine.first(generation)
            for _ in range(127):
                await engine.following(generation)
            engine.end(generation)

    tasks = [asyncio.create_task(engine.run()), asyncio.create_task(user())]
    while meter.window is None:
        await asyncio.sleep(0.5)
        meter.note(engine.load(), asyncio.get_running_loop().time())
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    return meter.window


LLAMA_PAGE = """\
llamacpp:prompt_tokens_total {read}
llamacpp:prompt_tokens_cached_total {cached}
llamacpp:prompt_seconds_total {prompt_s}
llamacpp:tokens_predicted_total {tokens}
llamacpp:tokens_predicted_seconds_total {tokens_s}
llamacpp:spec_decode_num_draft_tokens_total 0
llamacpp:requests_processing 2
llamacpp:requests_deferred 0
"""


def test_llama_cpps_answers_are_counted_in_its_slots() -> None:
    """Two slots, in each an answer of 100 tokens every 4 s: 0.5 s for the prompt, the rest for 99."""
    meter, engine = SpeedMeter(), LlamacppEngine()
    for number in range(2 * 401 + 1):
        seconds = number / 2
        done = 2 * int(seconds // 4)  # answers
        metrics = LLAMA_PAGE.format(
            read=200 * done, cached=100 * done, prompt_s=0.5 * done, tokens=100 * done,
            tokens_s=3.5 * done,
        )  # fmt: skip
        slots = [
            {"id": slot, "id_task": 7 * done + slot, "is_processing": True, "n_prompt_tokens": 9}
            for slot in (0, 1)
        ]
        meter.note(
            engine.load(metrics, json.dumps([*slots, {"id": 2, "is_processing": False}])), seconds
        )

    window = meter.window
    assert window is not None
    assert flaw(window) == ""
    assert window.answer_s == pytest.approx(4.0, rel=0.02)
    assert window.ttft_s == pytest.approx(0.5, rel=0.02)
    assert window.tpot_s == pytest.approx(3.5 / 99, rel=0.02)
    assert window.input_tokens == pytest.approx(300, rel=0.02)
    assert window.prefix_hit == pytest.approx(1 / 3)
    assert window.concurrency == 2


def test_precisions_of_llama_cpp_are_calibrated_apart_on_as_many_threads() -> None:
    """From plan to plan: what is seen of Q8_0 is not said of FP16."""
    q8 = on_llamacpp(Calibration(), precision=("q8_0",))
    assert q8.speed is not None
    calibration = Calibration().with_measured(
        q8.speed.setup, model="m", observed="", ttft=1.5, tpot=1.5
    )

    again = on_llamacpp(calibration, precision=("q8_0",))
    plain = on_llamacpp(Calibration(), precision=("fp16",))

    assert again.speed is not None
    assert again.speed.costs.tpot_factor > 1.2
    ratio = again.shape.prediction.tpot_ms / q8.shape.prediction.tpot_ms
    assert ratio == pytest.approx(again.speed.costs.tpot_factor)
    assert on_llamacpp(calibration, precision=("fp16",)) == plain


def on_llamacpp(calibration: Calibration, **changes: Any) -> Variant:
    wish = {"name": "chat", "model": "nano-7b", "engine": "llamacpp", **changes}
    pool = Pool(
        name="here", gpu="cpu", gpus_per_node=2, memory_gib_per_gpu=4, kv_cache_gib_per_gpu=1
    )
    fleet = FleetSpec(fleet="x", models=(FleetModel(**wish),))
    catalogue = CATALOGUE.with_calibration(calibration)
    [variant] = make_plan(fleet, Inventory(pools=(pool,)), catalogue).variants
    return variant
