"""Real engines with nano models, and a gateway process in front of them."""

from __future__ import annotations

import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from cluster.checkpoints import locate
from cluster.engines.vllm import VllmEngine
from cluster.processes import free_ports, start_guarded, stop_guarded, tail
from gateway.endpoints import Endpoint, EndpointsFile, ServedModel
from placement.catalogue import load_catalogue
from placement.fleet import FleetModel, FleetSpec
from placement.inventory import Inventory, Pool
from placement.plan import Variant
from placement.planner import make_plan
from placement.spec import dump_yaml

API_KEY = "secret"
_NO_BLANKS = '{"backend": "xgrammar", "disable_any_whitespace": true}'
_PATIENCE_S = 600.0
_CHAT_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_SERVE_GGUF = """
import sys, threading, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.model_alias = sys.argv[1], int(sys.argv[2]), {sys.argv[3]}
params.hostnames, params.n_ctx, params.n_parallel = ["127.0.0.1"], 4096, 2
params.kv_unified, params.fit_params, params.warmup = True, False, False
params.embedding, params.use_jinja, params.cpuparams.n_threads = True, True, 1
params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
server = xllamacpp.Server(params)
threading.Event().wait()
"""


@dataclass(frozen=True, slots=True)
class Running:
    """An engine's HTTP server. `model` is the name that it and the gateway serve."""

    kind: str
    model: str
    url: str
    api_key: str | None = None


@contextmanager
def vllm(folder: Path) -> Iterator[Running]:
    """vLLM with a nano model that sees images, started as bora starts it, and with tools."""
    flags = (
        *("--enable-auto-tool-choice", "--tool-call-parser", "mistral"),
        # Else a model that knows nothing writes blanks until the answer is full.
        *("--structured-outputs-config", _NO_BLANKS),
    )
    with _vllm(folder, "vllm", _planned("chat", "nano-small"), flags) as running:
        yield running


@contextmanager
def vllm_of_vectors(folder: Path) -> Iterator[Running]:
    """vLLM with a nano model that makes vectors of texts."""
    flags = ("--runner", "pooling", "--convert", "embed")
    with _vllm(folder, "vectors", _planned("vectors", "nano-7b"), flags) as running:
        yield running


@contextmanager
def llamacpp(folder: Path) -> Iterator[Running]:
    """llama.cpp's server with a random model."""
    path = folder / "tiny.gguf"
    _write_gguf(path)
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = (sys.executable, "-c", _SERVE_GGUF, str(path), str(port), "llama")
    with _process(command, folder / "llamacpp.log", f"{url}/health"):
        yield Running("llamacpp", "llama", url)


@contextmanager
def gateway(folder: Path, engines: Sequence[Running]) -> Iterator[str]:
    """`python -m gateway` in front of `engines`; yields its URL."""
    endpoints = tuple(
        Endpoint(
            model=e.model,
            url=e.url,
            id=e.kind,
            engine="vllm" if e.api_key else e.kind,
            api_key=e.api_key,
        )
        for e in engines
    )
    models = tuple(ServedModel(name=e.model, aliases=(f"{e.model}-alias",)) for e in engines)
    path = folder / "endpoints.yaml"
    path.write_text(dump_yaml(EndpointsFile(endpoints=endpoints, models=models)))
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = (
        *(sys.executable, "-m", "gateway", "--endpoints", str(path)),
        *("--http-port", str(port), "--no-grpc"),
    )
    with _process(command, folder / "gateway.log", f"{url}/ready"):
        yield url


@contextmanager
def _process(
    command: Sequence[str], log: Path, health: str, env: Mapping[str, str] | None = None
) -> Iterator[None]:
    process = start_guarded(command, log=log, env=env, grace_s=5.0)
    try:
        until = time.monotonic() + _PATIENCE_S
        while not _answers(health):
            assert process.poll() is None, tail(log, 40)
            assert time.monotonic() < until, tail(log, 40)
            time.sleep(0.1)
        yield
    finally:
        stop_guarded(process)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@contextmanager
def _vllm(folder: Path, kind: str, variant: Variant, flags: tuple[str, ...]) -> Iterator[Running]:
    [port] = free_ports(1)
    launch = VllmEngine().launch(
        variant, checkpoint=locate(variant), host="127.0.0.1", port=port, api_key=API_KEY
    )
    url = f"http://127.0.0.1:{port}"
    command = (*launch.command, *flags)
    with _process(command, folder / f"{kind}.log", f"{url}/health", launch.env):
        yield Running(kind, variant.model, url, API_KEY)


def _planned(name: str, nano: str) -> Variant:
    model = FleetModel(name=name, model=nano, dtype="float32", max_model_len=8192, max_num_seqs=16)
    pool = Pool(
        name="here", gpu="cpu", gpus_per_node=2, memory_gib_per_gpu=6, kv_cache_gib_per_gpu=1
    )
    fleet = FleetSpec(fleet="test", models=(model,))
    [variant] = make_plan(fleet, Inventory(pools=(pool,)), load_catalogue()).variants
    return variant


def _write_gguf(path: Path) -> None:
    """A random two-layer Llama of fixed weights, with one token per byte and some longer ones."""
    hidden, heads, kv_heads, width, ff, vocab = 128, 4, 2, 32, 256, 512
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"t{index}" for index in range(vocab - len(tokens))]
    writer: Any = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(8192)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_file_type(0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (vocab - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    # A prompt and a grammar must begin with the same bytes.
    writer.add_add_space_prefix(False)
    writer.add_chat_template(_CHAT_TEMPLATE)
    keys = kv_heads * width
    shapes = {"token_embd": (vocab, hidden), "output": (vocab, hidden), "output_norm": (hidden,)}
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (hidden,),
                "attn_q": (hidden, hidden),
                "attn_k": (keys, hidden),
                "attn_v": (keys, hidden),
                "attn_output": (hidden, hidden),
                "ffn_norm": (hidden,),
                "ffn_gate": (ff, hidden),
                "ffn_up": (ff, hidden),
                "ffn_down": (hidden, ff),
            }.items()
        }
    random = np.random.default_rng(7)
    for name, shape in shapes.items():
        values = np.ones(shape) if len(shape) == 1 else random.normal(0.0, 0.15, shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
