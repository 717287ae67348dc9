"""llama.cpp's HTTP server as a process: `python -m cluster.engines.llamacpp_server --model FILE ...`.

Takes those flags of `llama-server` that bora plans, and the key from LLAMA_API_KEY. It is what
xllamacpp, a wheel that brings llama.cpp without a `llama-server`, starts inside this process.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import xllamacpp

from cluster.errors import EngineFailed
from cluster.host_memory import available_bytes
from placement.errors import ConfigError
from placement.headers.model_files import split_parts

GIB = 2**30
_BUFFER_SIZES = 4  # log level at which llama.cpp tells sizes of weights, cache and buffers
_ERRORS = 1  # warnings are told for every other request
_EXPERTS = r"blk\.{layer}\.ffn_(up|down|gate_up|gate)_(ch|)exps=CPU"  # as --n-cpu-moe
_CACHE_TYPES = {
    "f32": xllamacpp.ggml_type.GGML_TYPE_F32,
    "f16": xllamacpp.ggml_type.GGML_TYPE_F16,
    "q8_0": xllamacpp.ggml_type.GGML_TYPE_Q8_0,
    "q4_0": xllamacpp.ggml_type.GGML_TYPE_Q4_0,
}
_FLASH = {
    "on": xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    "auto": xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_AUTO,
}
_SPLIT = {
    "none": xllamacpp.llama_split_mode.LLAMA_SPLIT_MODE_NONE,
    "layer": xllamacpp.llama_split_mode.LLAMA_SPLIT_MODE_LAYER,
    "row": xllamacpp.llama_split_mode.LLAMA_SPLIT_MODE_ROW,
}
_LOAD = {
    "mmap": xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP,
    "none": xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE,
    "mlock": xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MLOCK,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal ends this process; the exit status of a start that failed."""
    options = parser().parse_args(arguments)
    try:
        _require_files(options)
        _require_host_memory(options.host_memory_bytes)
        _require_gpus(options)
        server = _start(options)
    except EngineFailed as error:
        print(f"llama.cpp cannot start: {error}", flush=True)  # noqa: T201 - the engine's log
        return 1
    while server:  # what it serves with are threads of its own
        signal.pause()
    return 0


def parser() -> argparse.ArgumentParser:
    """The flags: names and meaning are llama-server's."""
    flags = argparse.ArgumentParser(prog="llamacpp_server", allow_abbrev=False)
    flags.add_argument("--model", required=True, help="a .gguf file, the first of its parts")
    flags.add_argument("--alias", required=True, help="the model's name for clients")
    flags.add_argument("--host", default="127.0.0.1")
    flags.add_argument("--port", type=int, required=True)
    flags.add_argument("--host-memory-bytes", type=int, default=0, help="that must be free")
    for flag, default in (
        ("--ctx-size", 0), ("--parallel", 1), ("--kv-unified-per-slot", 0), ("--batch-size", 2048),
        ("--ubatch-size", 512), ("--n-gpu-layers", 0), ("--n-cpu-moe", 0), ("--cache-ram", 0),
        ("--threads", 0),
    ):  # fmt: skip
        flags.add_argument(flag, type=int, default=default)
    flags.add_argument("--tensor-split", type=_shares, default=(), metavar="N,N...")
    for flag in ("--mmproj", "--chat-template-file"):
        flags.add_argument(flag, default="")
    for flag in ("--kv-unified", "--jinja", "--metrics", "--embeddings"):
        flags.add_argument(flag, action="store_true")
    for flag, choices, chosen in (
        ("--flash-attn", tuple(_FLASH), "on"), ("--split-mode", tuple(_SPLIT), "layer"),
        ("--cache-type-k", tuple(_CACHE_TYPES), "f16"),
        ("--cache-type-v", tuple(_CACHE_TYPES), "f16"),
        ("--fit", ("on", "off"), "off"), ("--load-mode", tuple(_LOAD), "mmap"),
    ):  # fmt: skip
        flags.add_argument(flag, choices=choices, default=chosen)
    return flags


def common_params(options: argparse.Namespace) -> xllamacpp.CommonParams:
    """llama.cpp's own form of the flags."""
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.mmproj.path = options.mmproj
    params.model_alias = {options.alias}
    params.hostnames, params.port = [options.host], options.port
    params.api_keys = [key] if (key := os.environ.get("LLAMA_API_KEY")) else []
    params.n_ctx, params.n_parallel = options.ctx_size, options.parallel
    params.kv_unified = options.kv_unified
    params.kv_unified_per_slot = options.kv_unified_per_slot
    params.n_batch, params.n_ubatch = options.batch_size, options.ubatch_size
    params.flash_attn_type = _FLASH[options.flash_attn]
    params.n_gpu_layers, params.split_mode = options.n_gpu_layers, _SPLIT[options.split_mode]
    shares = options.tensor_split
    params.tensor_split = [*shares, *[0.0] * (len(params.tensor_split) - len(shares))]
    params.tensor_buft_overrides = ",".join(
        _EXPERTS.replace("{layer}", str(layer)) for layer in range(options.n_cpu_moe)
    )
    params.cache_type_k = _CACHE_TYPES[options.cache_type_k]
    params.cache_type_v = _CACHE_TYPES[options.cache_type_v]
    params.cache_ram_mib, params.fit_params = options.cache_ram, options.fit == "on"
    params.load_mode = _LOAD[options.load_mode]
    params.use_jinja, params.endpoint_metrics, params.endpoint_slots = options.jinja, True, True
    params.embedding = options.embeddings
    if options.chat_template_file:
        params.chat_template = Path(options.chat_template_file).read_text(encoding="utf-8")
    if options.threads:
        params.cpuparams.n_threads = options.threads
        params.cpuparams_batch.n_threads = options.threads
    # As OpenAI and vLLM: what a client does not ask for does not change what the model says. A
    # file's own recommendation (general.sampling.*) still counts, as generation_config.json there.
    sampling = params.sampling
    sampling.temp, sampling.top_p, sampling.top_k, sampling.min_p = 1.0, 1.0, 0, 0.0
    params.sampling = sampling
    params.ui = False
    return params


def _start(options: argparse.Namespace) -> xllamacpp.Server:
    """Load and listen. The sizes that it tells on the way are wanted, a log of requests is not."""
    params = common_params(options)
    set_level = getattr(
        ctypes.CDLL(xllamacpp.xllamacpp.__file__), "_Z30common_log_set_verbosity_tholdi", None
    )
    if set_level is not None:
        params.verbosity = _BUFFER_SIZES
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise EngineFailed(f"{error} The lines above tell why") from None
    if set_level is not None:
        set_level(_ERRORS)
    return server


def _require_files(options: argparse.Namespace) -> None:
    """All that are named, and of a model in parts every part; llama.cpp wants the first."""
    for flag in ("model", "mmproj", "chat_template_file"):
        path = getattr(options, flag)
        if path and not Path(path).is_file():
            name = flag.replace("_", "-")
            raise EngineFailed(f"--{name} {path}: no such file on this node")
    try:
        options.model = str(split_parts(Path(options.model))[0])
    except ConfigError as error:
        raise EngineFailed(f"{error} on this node; copy the others beside it") from None


def _require_host_memory(needed: int) -> None:
    """Beyond it, weights would be read from disk again and again, or the kernel ends somebody."""
    available = available_bytes()
    if needed > available:
        raise EngineFailed(
            f"the plan needs {needed / GIB:.1f} GiB of host memory, {available / GIB:.1f} GiB are "
            f"free on this node. Stop what takes them, or plan with fewer bits per weight, a "
            f"smaller max_model_len or more GPUs"
        )


def _require_gpus(options: argparse.Namespace) -> None:
    wanted = max(1, len(options.tensor_split)) if options.n_gpu_layers > 0 else 0
    kinds = xllamacpp.ggml_backend_dev_type
    found = [
        device["name"]
        for device in xllamacpp.get_device_info()
        if device["type"] == kinds.GGML_BACKEND_DEVICE_TYPE_GPU
    ]
    if wanted > len(found):
        raise EngineFailed(
            f"the plan puts layers on {wanted} GPUs, this xllamacpp sees {len(found)}. PyPI's "
            f"wheel is for CPUs: install the CUDA wheel of the same version on GPU nodes, and "
            f"check CUDA_VISIBLE_DEVICES"
        )


def _shares(text: str) -> tuple[float, ...]:
    """Of each GPU."""
    try:
        return tuple(float(share) for share in text.split(",") if share)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers with commas between them") from None


if __name__ == "__main__":
    sys.exit(main())
