"""Real vLLM on the CPU: each configuration is started once and answers all of its tests."""

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image

from cluster.checkpoints import locate
from cluster.engines.vllm import VllmEngine
from cluster.processes import free_ports, start_guarded, stop_guarded, tail
from placement.candidate import Candidate, device_of
from placement.catalogue import load_catalogue
from placement.fleet import FleetModel, FleetSpec
from placement.inventory import Inventory, Pool
from placement.performance import Load
from placement.plan import Variant
from placement.planner import make_plan
from placement.shape import make_shape

pytestmark = pytest.mark.engine

ENGINE = VllmEngine()
API_KEY = "secret"
ENDLESS = {"temperature": 0, "ignore_eos": True}
PROMPTS = (
    "The bora blows",
    "def fibonacci(n):",
    "Once upon a time, in a city by the sea,",
    "Roses are red. " * 40,
)


@dataclass(frozen=True, slots=True)
class Configuration:
    model: str
    tensor_parallel_size: int = 1
    expert_parallel: bool = False
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"

    def __str__(self) -> str:
        expert_parallel = "-ep" if self.expert_parallel else ""
        pipeline = "-pp2" if self.pipeline_parallel_size == 2 else ""
        copies = "-dp2" if self.data_parallel_size == 2 else ""
        fp8 = "-kv-fp8" if self.kv_cache_dtype == "fp8" else ""
        sizes = f"tp{self.tensor_parallel_size}{copies}{expert_parallel}{pipeline}"
        return f"{self.model}-{sizes}{fp8}"


CONFIGURATIONS = [
    Configuration("nano-mixtral"),
    Configuration("nano-mixtral", kv_cache_dtype="fp8"),
    Configuration("nano-mixtral", 2),
    Configuration("nano-mixtral", 2, expert_parallel=True),
    Configuration("nano-mixtral", data_parallel_size=2, expert_parallel=True),
    Configuration("nano-large-3"),
    Configuration("nano-large-3", 2),
    Configuration("nano-large-3", 2, expert_parallel=True),
    Configuration("nano-large-3", data_parallel_size=2, expert_parallel=True),
    Configuration("nano-mixtral", pipeline_parallel_size=2),
    Configuration("nano-large-3", pipeline_parallel_size=2),
    Configuration("nano-small", pipeline_parallel_size=2),
    Configuration("nano-7b"),
    Configuration("nano-7b", 2),
    Configuration("nano-7b", pipeline_parallel_size=2),
    Configuration("nano-small"),
    Configuration("nano-small", 2),
]


@dataclass(frozen=True, slots=True)
class Running:
    variant: Variant
    url: str
    log: Path
    stages: list[str] = field(default_factory=list)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps({"model": "chat", **body}).encode(),
            headers={"authorization": f"Bearer {API_KEY}", "content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            text = response.read().decode()
        return json.loads(text) if text.startswith("{") else text

    def chat(self, content: Any, **options: Any) -> Any:
        messages = [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": content},
        ]
        body = {"messages": messages, "temperature": 0, **options}
        return self.ask("/v1/chat/completions", body)


def planned(configuration: Configuration) -> Variant:
    """What the planner makes of it: float32, so that the order of additions hardly matters."""
    model = FleetModel(
        name="chat",
        model=configuration.model,
        dtype="float32",
        max_model_len=8192,
        max_num_seqs=16,
        tensor_parallel_size=configuration.tensor_parallel_size,
        data_parallel_size=configuration.data_parallel_size,
        expert_parallel=configuration.expert_parallel,
        kv_cache_dtype=configuration.kv_cache_dtype,
    )
    pool = Pool(
        name="here", gpu="cpu", gpus_per_node=2, memory_gib_per_gpu=6, kv_cache_gib_per_gpu=1
    )
    fleet = FleetSpec(fleet="test", models=(model,))
    plan = make_plan(fleet, Inventory(pools=(pool,)), load_catalogue())
    [variant] = plan.variants
    return in_a_pipeline(variant, pool) if configuration.pipeline_parallel_size > 1 else variant


def in_a_pipeline(variant: Variant, pool: Pool) -> Variant:
    """The same in two pipeline stages, which the planner does not choose for one node."""
    catalogue = load_catalogue()
    model = catalogue.model(variant.catalogue_model)
    candidate = Candidate(
        model=model,
        checkpoint=model.checkpoints[0],
        device=device_of(pool, catalogue.gpu("cpu")),
        pipeline_parallel_size=2,
        max_model_len=variant.shape.max_model_len,
        max_num_seqs=variant.shape.max_num_seqs,
        max_num_batched_tokens=variant.shape.max_num_batched_tokens,
        dtype="float32",
    )
    load = Load(concurrency=1, input_tokens=512, output_tokens=128)
    return variant.model_copy(update={"shape": make_shape(candidate, load=load)})


@pytest.fixture(scope="module", params=CONFIGURATIONS, ids=str)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    variant = planned(request.param)
    [port] = free_ports(1)
    log = tmp_path_factory.mktemp(str(request.param)) / "engine.log"
    launch = ENGINE.launch(
        variant, checkpoint=locate(variant), host="127.0.0.1", port=port, api_key=API_KEY
    )
    running = Running(variant, f"http://127.0.0.1:{port}", log)
    process = start_guarded(launch.command, log=log, env=launch.env, grace_s=5.0)
    try:
        started = time.monotonic()
        while not is_healthy(running):
            assert process.poll() is None, tail(log, 40)
            assert time.monotonic() - started < 600, tail(log, 40)
            stage = next(filter(None, map(ENGINE.stage, tail(log, 3).splitlines()[::-1])), None)
            if stage and stage not in running.stages:
                running.stages.append(stage)
            time.sleep(0.1)
        print(f"\n{request.param}: ready after {time.monotonic() - started:.1f} s")  # noqa: T201
        yield running
    finally:
        stop_guarded(process)


def is_healthy(running: Running) -> bool:
    try:
        running.ask("/health")
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def outputs() -> dict[str, list[list[int]]]:
    """Tokens of each model's first configuration."""
    return {}


def test_logged_kv_cache_is_what_the_planner_predicts(engine: Running) -> None:
    facts = ENGINE.facts(engine.log.read_text())

    assert facts.kv_cache_tokens == engine.variant.shape.kv_cache_tokens


def test_loaded_weights_are_what_the_planner_predicts(engine: Running) -> None:
    loaded = ENGINE.facts(engine.log.read_text()).weights_bytes

    assert loaded == pytest.approx(engine.variant.shape.per_gpu.weights_bytes, rel=0.01)


def test_greedy_outputs_do_not_depend_on_parallel_sizes(
    engine: Running, outputs: dict[str, list[list[int]]]
) -> None:
    greedy = {"max_tokens": 32, "temperature": 0, "ignore_eos": True, "return_token_ids": True}

    answer = engine.ask("/v1/completions", {"prompt": PROMPTS, **greedy})

    tokens = [choice["token_ids"] for choice in answer["choices"]]
    assert [len(choice) for choice in tokens] == [32] * len(PROMPTS)
    assert min(len(set(choice)) for choice in tokens) > 8  # not one token over and over
    assert len({tuple(choice) for choice in tokens}) == len(PROMPTS)
    numbers = f"{engine.variant.catalogue_model}, KV {engine.variant.shape.kv_cache_dtype}"
    assert tokens == outputs.setdefault(numbers, tokens)


def test_chat_is_answered_with_text(engine: Running) -> None:
    answer = engine.chat("What is the bora?", max_tokens=24)

    assert answer["model"] == "chat"
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["usage"]["completion_tokens"] == 24


def test_answer_has_an_end_when_the_client_names_none(engine: Running) -> None:
    assert engine.chat("Go on.")["usage"]["completion_tokens"] == 256


def test_load_is_read_from_the_metrics(engine: Running) -> None:
    metrics = engine.ask("/metrics")

    assert "vllm:num_requests_running" in metrics
    assert "vllm:num_requests_waiting" in metrics
    assert "vllm:kv_cache_usage_perc" in metrics
    assert ENGINE.load(metrics).running == 0


def test_speed_is_read_from_the_metrics(engine: Running) -> None:
    """Two answers of 16 tokens to the same long prompt, which the prefix cache has afterwards."""
    before = ENGINE.load(engine.ask("/metrics")).counters
    assert before is not None
    for _ in range(2):
        engine.ask("/v1/completions", {"prompt": "Rain. " * 400, "max_tokens": 16, **ENDLESS})

    after = ENGINE.load(engine.ask("/metrics")).counters
    assert after is not None
    done = after.since(before)

    assert done is not None
    assert (done.prompts, done.intervals) == (2, 30)
    assert done.prompt_tokens > 2 * 400
    # Of latents vLLM caches nothing on a CPU; of two copies each may have got one of the prompts.
    latent = "large-3" in engine.variant.catalogue_model
    surely = not latent and engine.variant.shape.data_parallel_size == 1
    least, most = 0.3 if surely else -1.0, 0.0 if latent else 0.5
    assert least * done.prompt_tokens < done.cached_tokens <= most * done.prompt_tokens
    assert done.ttft_s > 0
    assert done.intervals_s > 0
    assert done.preemptions == done.drafted == 0


def test_stages_are_told_while_it_starts(engine: Running) -> None:
    log = engine.log.read_text()

    told = {stage for stage in map(ENGINE.stage, log.splitlines()) if stage}

    assert {"starting workers", "loading weights", "allocating the KV cache"} <= told
    assert engine.stages  # and seen on the way, not only afterwards


def test_key_is_required(engine: Running) -> None:
    request = urllib.request.Request(engine.url + "/v1/models")

    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)

    with refused.value as response:
        assert response.status == 401


@pytest.mark.parametrize("engine", [Configuration("nano-small")], indirect=True, ids=str)
def test_images_are_looked_at(engine: Running) -> None:
    red, blue, red_again = (
        engine.chat([{"type": "text", "text": "What is this?"}, image_part(color)], max_tokens=12)
        for color in ("red", "blue", "red")
    )

    content = [answer["choices"][0]["message"]["content"] for answer in (red, blue, red_again)]
    assert content[0] == content[2] != content[1]
    assert red["usage"]["prompt_tokens"] > engine.chat("What is this?")["usage"]["prompt_tokens"]


def image_part(color: str) -> dict[str, Any]:
    png = io.BytesIO()
    Image.new("RGB", (56, 84), color).save(png, "PNG")
    data = base64.b64encode(png.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
