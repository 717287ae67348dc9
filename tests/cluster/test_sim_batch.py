import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.engines.sim_batch import Batch, Generation, Limits, Timing
from cluster.engines.sim_text import Continuation
from cluster.engines.sim_vocabulary import encode


def a_batch(*generations: Generation, **changes: int) -> Batch:
    values = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 1000,
        "kv_cache_tokens": 10_000,
        "max_model_len": 1000,
    } | changes
    timing = Timing(1000.0, tpot_ms=10.0, tpot_ms_at_max=24.0, max_num_seqs=values["max_num_seqs"])
    batch = Batch(Limits(**values), timing)
    for generation in generations:
        batch.add(generation)
    return batch


def a_generation(prompt_tokens: int, max_tokens: int) -> Generation:
    return Generation(prompt_tokens, max_tokens, Continuation(encode("the sea"), ignore_eos=True))


def run_until_empty(batch: Batch) -> dict[Generation, list[float]]:
    """Times on the simulated clock at which each request got its tokens, seconds."""
    now_s, times = 0.0, {}
    while step := batch.schedule():
        now_s += step.duration_s
        for generation, _ in batch.finish(step):
            times.setdefault(generation, []).append(now_s)
    return times


def test_lone_request_takes_its_prefill_and_then_the_lone_tpot() -> None:
    [times] = run_until_empty(a_batch(a_generation(100, 3))).values()

    assert times == pytest.approx([0.110, 0.120, 0.130])


def test_tpot_grows_with_the_batch_and_each_request_gets_one_token_a_step() -> None:
    batch = a_batch(*(a_generation(10, 5) for _ in range(8)))

    times = run_until_empty(batch)

    assert {tuple(t) for t in times.values()} == {tuple(next(iter(times.values())))}
    [*_, before, last] = next(iter(times.values()))
    assert last - before == pytest.approx(0.024)


def test_prompt_longer_than_the_token_budget_is_prefilled_in_chunks_beside_decodes() -> None:
    decoding, long = a_generation(10, 100), a_generation(250, 1)
    batch = a_batch(decoding, max_num_batched_tokens=101)
    batch.finish(batch.schedule())
    batch.add(long)

    chunks = []
    while long.completion_tokens == 0:
        step = batch.schedule()
        chunks += [chunk for _, chunk in step.prefills]
        batch.finish(step)

    assert chunks == [100, 100, 50]
    assert decoding.completion_tokens == 1 + len(chunks)


def test_requests_beyond_max_num_seqs_wait_their_turn() -> None:
    first, second, third = (a_generation(10, 2) for _ in range(3))
    batch = a_batch(first, second, third, max_num_seqs=1)

    times = run_until_empty(batch)

    assert times[first][-1] < times[second][0] < times[second][-1] < times[third][0]


def test_request_waits_until_its_prompt_and_max_tokens_fit_into_the_kv_cache() -> None:
    large, next_, small = a_generation(900, 50), a_generation(100, 10), a_generation(1, 1)
    batch = a_batch(large, next_, small, kv_cache_tokens=1000)

    batch.schedule()

    assert batch.running == [large]
    assert list(batch.waiting) == [next_, small], "first in, first out, also if small would fit"
    assert batch.kv_cache_usage == 0.95


@given(
    requests=st.lists(
        st.tuples(st.integers(0, 500), st.integers(1, 40), st.booleans()), max_size=20
    )
)
def test_limits_hold_at_every_step_and_everything_is_free_at_the_end(
    requests: list[tuple[int, int, bool]],
) -> None:
    generations = [a_generation(prompt, new) for prompt, new, _ in requests]
    batch = a_batch(*generations, kv_cache_tokens=1000, max_num_seqs=4, max_num_batched_tokens=64)
    leaving = [g for g, (_, _, leaves) in zip(generations, requests, strict=True) if leaves]

    while step := batch.schedule():
        assert len(batch.running) <= 4
        assert batch.reserved_tokens <= 1000
        assert len(step.decodes) + sum(chunk for _, chunk in step.prefills) <= 64
        if leaving:
            batch.remove(leaving.pop())
        batch.finish(step)

    assert (batch.reserved_tokens, batch.running, list(batch.waiting)) == (0, [], [])
