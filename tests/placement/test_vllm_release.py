from __future__ import annotations

import pytest

from placement.vllm_release import DEFAULT_RELEASE, MEASURED_RELEASE, RELEASES, release


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("0.5", "0.6"),
        ("0.6", "0.6"),
        ("0.10.2", "0.10"),
        ("0.16", "0.10"),
        ("0.19.1", "0.18"),
        ("0.31", "0.21"),
        ("0.32", "0.32"),
        ("0.40", "0.32"),
        ("1.0", "0.32"),
    ],
)
def test_a_release_has_the_constants_of_the_newest_that_is_not_newer(name: str, row: str) -> None:
    assert release(name) is RELEASES[row]


@pytest.mark.parametrize("slots", [1, 32, 128, 256, 512, 1024])
@pytest.mark.parametrize("vocabulary", [32_000, 131_072, 201_088])
def test_admission_takes_what_the_hungriest_sampler_took(slots: int, vocabulary: int) -> None:
    admission, old = release(DEFAULT_RELEASE), release("0.10")
    needed = old.sampler_peak_bytes(max_num_seqs=slots, vocab_size=vocabulary)

    reserved = admission.sampler_peak_bytes(max_num_seqs=slots, vocab_size=vocabulary)

    assert reserved + admission.cuda_graph_bytes >= needed - 1


def test_admission_lies_between_old_and_new_outside_torch() -> None:
    def gib(name: str, ranks: int) -> float:
        return release(name).non_torch_bytes(num_stages=1, ranks_per_stage=ranks)

    for ranks in (1, 8):
        assert gib("0.10", ranks) <= gib(DEFAULT_RELEASE, ranks) <= gib(MEASURED_RELEASE, ranks)
