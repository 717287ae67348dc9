import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.engines.sim_text import Continuation, StopStrings, Token
from cluster.engines.sim_vocabulary import (
    CLOSING_WORD,
    END_OF_SEQUENCE,
    VOCABULARY_SIZE,
    WORDS,
    NoSuchToken,
    decode,
    encode,
    text_of,
    token_bytes,
)


def tokens_after(prompt: list[int], number: int, seed: int | None = None) -> list[Token]:
    continuation = Continuation(prompt, seed=seed, ignore_eos=True)
    return [continuation.next_token() for _ in range(number)]


def test_answer_continues_from_any_of_its_tokens_on_any_engine() -> None:
    prompt = encode("Tell me of the 海.")
    whole = tokens_after(prompt, 300, seed=7)
    ids = [token.id for token in whole]

    for cut in range(300):
        begun = [token.text for token in whole[:cut]]
        rest = tokens_after(prompt + ids[:cut], 300 - cut, seed=7)
        assert [token.id for token in rest] == ids[cut:]
        assert "".join(begun + [token.text for token in rest]) == "".join(t.text for t in whole)


def test_answer_continues_from_its_text_too() -> None:
    whole = tokens_after(encode("Tell me."), 300)
    text = "".join(token.text for token in whole)

    for cut in range(0, len(text), 7):
        ids = encode("Tell me." + text[:cut])
        at_word = text[cut : cut + 1] in (" ", "")
        if at_word:
            rest = "".join(token.text for token in tokens_after(ids, 300))
            assert rest.startswith(text[cut:])


def test_some_characters_become_text_only_with_their_last_token() -> None:
    whole = tokens_after(encode("the sea"), 400)

    late = [token for token in whole if not token.text]
    assert 0.02 < len(late) / len(whole) < 0.4
    assert {len(token.text.strip()) for token in whole} > {0, 1, 3, 5}
    assert "\ufffd" not in "".join(token.text for token in whole)
    assert decode(token.id for token in whole).decode("utf-8", "ignore") == "".join(
        token.text for token in whole
    )


def test_answer_ends_after_the_closing_word_unless_it_may_not() -> None:
    prompt = encode(f"all is {CLOSING_WORD}")

    assert Continuation(prompt).next_token().id == END_OF_SEQUENCE
    assert Continuation(prompt).next_token(may_end=False).id != END_OF_SEQUENCE
    assert Continuation(prompt, ignore_eos=True).next_token().id != END_OF_SEQUENCE


def test_seed_and_prompt_choose_the_text() -> None:
    answers = {
        tuple(tokens_after(encode(prompt), 20, seed))
        for prompt, seed in [("a", None), ("a", None), ("b", None), ("a", 1)]
    }

    assert len(answers) == 3


def test_every_word_is_one_token_and_long_words_are_several() -> None:
    assert {len(encode(word)) for word in (*WORDS, CLOSING_WORD)} == {1}
    assert {len(encode(f" {word}")) for word in (*WORDS, CLOSING_WORD)} == {1}
    assert len(encode("x" * 8000)) == 2000
    assert encode("") == []


def test_what_was_generated_counts_the_same_in_a_prompt() -> None:
    ids = [token.id for token in tokens_after(encode("wind and"), 200)]
    text = text_of(ids)

    assert text_of(encode(text)) == text
    assert len(encode(" sea shore. calm.")) == 4


@given(st.text())
def test_ids_of_any_text_give_it_back(text: str) -> None:
    assert text_of(encode(text)) == text


@given(st.integers(0, VOCABULARY_SIZE - 1))
def test_any_id_says_something_that_has_ids_again(token_id: int) -> None:
    said = token_bytes(token_id)

    assert (len(said) > 0) == (token_id > END_OF_SEQUENCE)
    assert decode(encode(said.decode("latin-1"))).decode() == said.decode("latin-1")


@pytest.mark.parametrize("token_id", [-1, VOCABULARY_SIZE])
def test_an_id_outside_of_the_vocabulary_is_refused(token_id: int) -> None:
    with pytest.raises(NoSuchToken, match=f"{token_id} is out of vocabulary"):
        Continuation([token_id])


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
