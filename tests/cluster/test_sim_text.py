from hypothesis import given
from hypothesis import strategies as st

from cluster.engines.sim_text import CLOSING_WORD, WORDS, Continuation, StopStrings, count_tokens


def test_prompt_that_holds_half_an_answer_is_continued_with_the_other_half() -> None:
    whole = Continuation("Tell me.", seed=7)
    tokens = list(iter(whole.next_token, None))

    rest = Continuation("Tell me." + "".join(tokens[:5]), seed=7)

    assert list(iter(rest.next_token, None)) == tokens[5:]
    assert tokens[-1].strip() == CLOSING_WORD


def test_seed_and_prompt_choose_the_text() -> None:
    def text(prompt: str, seed: int | None = None) -> tuple[str | None, ...]:
        continuation = Continuation(prompt, seed=seed, ignore_eos=True)
        return tuple(continuation.next_token() for _ in range(20))

    assert text("a") == text("a")
    assert len({text("a"), text("b"), text("a", seed=1)}) == 3


def test_every_word_is_one_token_and_long_words_are_several() -> None:
    assert {count_tokens(word) for word in (*WORDS, CLOSING_WORD)} == {1}
    assert count_tokens("x" * 8000) == 1000
    assert count_tokens("") == 0


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=3)))
def test_text_ends_before_the_first_stop_string_however_it_is_cut(
    text: str, stop: list[str]
) -> None:
    filter_ = StopStrings(tuple(stop))
    shown = ""
    for character in text:
        piece, stopped = filter_.push(character)
        shown += piece
        if stopped:
            break
    else:
        shown += filter_.flush()

    assert text.startswith(shown)
    assert not any(string in shown for string in stop)
    assert shown == text or any(text.startswith(string, len(shown)) for string in stop), (
        "it is cut where a stop string begins"
    )
