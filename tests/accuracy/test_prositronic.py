"""The seeds' page digit by digit, and beside it what is true."""

from __future__ import annotations

import pytest

from placement.candidate import GIB
from placement.catalogue import Checkpoint, Precision
from placement.gguf_weights import weights_by_arithmetic
from placement.kv_cache import kv_bytes_per_token
from placement.llamacpp import LlamaTask, Placement, place
from placement.weight_bytes import checkpoint_bytes
from tests.accuracy.cases import CATALOGUE
from tests.accuracy.prositronic import Page, page

SMALL = CATALOGUE.model("mistral-small-3-24b-2501").architecture
FP32_GB, Q8_GB, Q4_1_GB = 87.82, 23.33, 13.85  # as the pages print them


def kv_gb(architecture_tokens: int) -> float:
    per_token = kv_bytes_per_token(SMALL, tensor_parallel_size=1, element_bytes=2)
    return architecture_tokens * per_token / GIB


@pytest.mark.parametrize(
    ("gpu_gb", "size_gb", "context", "printed"),
    [
        (48, FP32_GB, 512, Page(21, 47.5, 41.7)),  # L40S: the page in the seeds
        (24, Q4_1_GB, 32768, Page(40, 21.4, 0.0)),  # RTX 4090
        (16, Q8_GB, 824, Page(24, 15.4, 9.3)),  # P100
        (20, FP32_GB, 3099, Page(8, 19.4, 70.3)),  # RTX 4000 SFF
    ],
)
def test_the_oracle_prints_what_the_pages_print(
    gpu_gb: float, size_gb: float, context: int, printed: Page
) -> None:
    answer = page(size_gb=size_gb, num_layers=40, gpu_gb=gpu_gb, kv_cache_gb=kv_gb(context))

    assert answer == printed


def truly(precision: Precision, gpu: str, context: int) -> Placement:
    checkpoint = Checkpoint(precision=precision, format="gguf", source="x")
    task = LlamaTask(SMALL, weights_by_arithmetic(SMALL, checkpoint), context=context)
    placed = place(task, memory_bytes=CATALOGUE.gpu(gpu).memory_bytes or 0, num_gpus=1)
    assert placed is not None
    return placed


def test_the_page_fills_more_than_the_card_has_and_the_truth_is_fewer_layers() -> None:
    card = CATALOGUE.gpu("L40S").memory_bytes or 0
    placed = truly("fp32", "L40S", 512)

    assert card < 47.5 * GIB  # of which the page says that they are used
    assert placed.gpu_layers < 21
    assert (
        sum(placed.gpus[0].model_dump(include={"weights_bytes", "kv_cache_bytes"}).values()) < card
    )


def test_a_layer_is_smaller_than_a_fortieth_because_embedding_and_head_are_no_layers() -> None:
    size = checkpoint_bytes(SMALL, Checkpoint(precision="fp32", format="gguf", source="x"))
    vocabulary = 2 * 4 * SMALL.vocab_size * SMALL.hidden_size

    assert vocabulary / GIB == pytest.approx(5.0)
    assert (size - vocabulary) / 40 / GIB == pytest.approx(2.07, abs=0.005)
    assert size / 40 / GIB == pytest.approx(2.20, abs=0.005)


def test_on_a_4090_the_page_is_right_that_all_layers_fit() -> None:
    assert truly("q4_1", "RTX-4090", 32768).gpu_layers == 40


def test_latent_attention_is_not_multi_head_attention() -> None:
    """The page of DeepSeek V3.1 has 53.4 GiB for 32k tokens, and prints 54.7 of 24 GB used."""
    architecture = CATALOGUE.model("mistral-large-3").architecture  # of the same latents
    latent = kv_bytes_per_token(architecture, tensor_parallel_size=1, element_bytes=2)
    as_if_cached_whole = 2 * 2 * architecture.num_layers * architecture.hidden_size

    assert 32768 * as_if_cached_whole / GIB == pytest.approx(53.4, abs=0.05)
    assert 32768 * latent / GIB == pytest.approx(2.14, abs=0.005)
