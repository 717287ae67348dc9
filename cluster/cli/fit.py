"""`bora fit`: what runs where, with how much context and how fast; why not, and what would help."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import psutil
import typer

from cluster.calibration_file import calibrated_catalogue
from cluster.models import find_subject
from placement.catalogue import Catalogue
from placement.errors import ConfigError
from placement.fit_checkpoints import Subject
from placement.fit_request import precision_called
from placement.vllm_release import DEFAULT_RELEASE

EXIT_DOES_NOT_FIT = 3


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(fit)


def fit(  # noqa: PLR0917 - one parameter for each option
    model: Annotated[
        str | None,
        typer.Argument(help="Catalogue name, folder, .gguf file or Hugging Face repo id."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="TYPE[:COUNT] of a node, e.g. H100-SXM:8. Without: all types ranked."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes like this one.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="bf16, fp16, fp32, fp8, nvfp4, awq, gptq, q4_k_m, q8_0 ...")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="vllm or llamacpp.")] = None,
    tensor_parallel_size: Annotated[int | None, typer.Option(min=1)] = None,
    pipeline_parallel_size: Annotated[int | None, typer.Option(min=1)] = None,
    data_parallel_size: Annotated[int | None, typer.Option(min=1)] = None,
    expert_parallel: Annotated[
        bool | None, typer.Option("--expert-parallel/--no-expert-parallel")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Context, tokens.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Requests at once.")] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a step.")
    ] = None,
    vllm_release: Annotated[
        str, typer.Option(help="Whose memory constants count, e.g. 0.19.")
    ] = DEFAULT_RELEASE,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="Share of the GPU memory that the engine takes.")
    ] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="auto or fp8.")] = None,
    host_memory_gib: Annotated[
        float | None, typer.Option(help="Of a node, for what llama.cpp leaves there.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests at once to predict the speed for.")
    ] = None,
    input_tokens: Annotated[int | None, typer.Option(min=1, help="Of a request.")] = None,
    output_tokens: Annotated[int | None, typer.Option(min=1, help="Of a request.")] = None,
    prefix_hit: Annotated[
        float | None, typer.Option(help="Share of prompt tokens that the prefix cache has.")
    ] = None,
    acceptance_rate: Annotated[
        float | None,
        typer.Option(help="Of each of a draft's tokens (vLLM; the draft's memory is not counted)."),
    ] = None,
    num_speculative_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a draft at once.")
    ] = None,
    host_bandwidth_gb_s: Annotated[
        float | None, typer.Option(help="Of the host's memory, for what llama.cpp leaves there.")
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output.")
    ] = False,
    helm: Annotated[bool, typer.Option("--helm", help="Chart values for the best shape.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Claims of well-known pages, and what is true.")
    ] = False,
) -> None:
    """Can a model run on these GPUs, in which shapes, and if not, why and what would help."""
    catalogue = calibrated_catalogue()
    if explain:
        _explain(catalogue, as_json=json_)
        return
    if model is None:
        raise ConfigError("a MODEL is needed: see `bora models`, or give a path or a repo id")
    wanted = None if precision is None else precision_called(precision)
    subject = find_subject(model, catalogue, precision=wanted)
    options = {
        "num_nodes": nodes,
        "precision": precision,
        "engine": engine,
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        "data_parallel_size": data_parallel_size,
        "expert_parallel": expert_parallel,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "gpu_memory_utilization": gpu_memory_utilization,
        "vllm_release": vllm_release,
        "kv_cache_dtype": kv_cache_dtype,
        "host_memory_gib": _host_memory_gib(gpu, host_memory_gib),
        "concurrency": concurrency,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "prefix_hit": prefix_hit,
        "acceptance_rate": acceptance_rate,
        "num_speculative_tokens": num_speculative_tokens,
        "host_bandwidth_gb_s": host_bandwidth_gb_s,
    }
    if json_ and helm:
        raise ConfigError("--json and --helm both want standard output: give one of them")
    if gpu is None:
        _rank(subject, catalogue, options, as_json=json_, helm=helm)
    else:
        _answer(subject, catalogue, gpu, options, as_json=json_, helm=helm)


def _answer(
    subject: Subject,
    catalogue: Catalogue,
    gpu: str,
    options: dict[str, Any],
    *,
    as_json: bool,
    helm: bool,
) -> None:
    from placement.fit import fit as evaluate  # noqa: PLC0415 - only this command needs it
    from placement.fit_request import make_request  # noqa: PLC0415

    answer = evaluate(subject, make_request(gpu, **options), catalogue)
    if as_json:
        print(answer.model_dump_json())
    elif helm and answer.best is not None:
        from cluster.cli.fit_helm import helm_values  # noqa: PLC0415

        print(helm_values(answer, answer.best), end="")
    else:
        from cluster.cli.fit_page import fit_page  # noqa: PLC0415 - rich tables
        from cluster.cli.render import page_console  # noqa: PLC0415

        page_console().print(fit_page(answer, subject.model))
    if answer.verdict == "does_not_fit":
        sys.exit(EXIT_DOES_NOT_FIT)


def _rank(
    subject: Subject,
    catalogue: Catalogue,
    options: dict[str, Any],
    *,
    as_json: bool,
    helm: bool,
) -> None:
    from placement.fit_ranking import rank_gpus  # noqa: PLC0415

    if helm:
        raise ConfigError("--helm needs --gpu: values are for one kind of node")
    ranking = rank_gpus(subject, catalogue, **options)
    if as_json:
        print(ranking.model_dump_json())
    else:
        from cluster.cli.fit_page import ranking_page  # noqa: PLC0415
        from cluster.cli.render import page_console  # noqa: PLC0415

        page_console().print(ranking_page(ranking))
    if all(entry.verdict == "does_not_fit" for entry in ranking.ranking):
        sys.exit(EXIT_DOES_NOT_FIT)


def _host_memory_gib(gpu: str | None, given: float | None) -> float | None:
    """On a CPU the memory is the host's: this machine's, if nothing else is said."""
    if given is None and gpu is not None and gpu.partition(":")[0].lower() == "cpu":
        return round(psutil.virtual_memory().total / 2**30, 1)
    return given


def _explain(catalogue: Catalogue, *, as_json: bool) -> None:
    from placement.fit_claims import claims  # noqa: PLC0415

    found = claims(catalogue)
    if as_json:
        print(json.dumps([asdict(claim) for claim in found]))
        return
    from cluster.cli.fit_page import claims_page  # noqa: PLC0415
    from cluster.cli.render import page_console  # noqa: PLC0415

    page_console().print(claims_page(found))
