"""What the simulated model says: tokens that depend on nothing but the tokens before them.

Like a greedy model, each token is a function of all tokens so far (prompt and generated alike) and
of the seed. So the same request gives the same text on every replica, and a request whose prompt is
another's prompt plus the beginning of its answer continues exactly where that one left off: a
stream can move to another engine in the middle, also in the middle of a character.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

from cluster.engines.sim_vocabulary import (
    CLOSING_WORD,
    END_OF_SEQUENCE,
    WORDS,
    byte_id,
    decode,
    token_bytes,
    word_id,
)

# Said byte by byte: 2, 3 and 4 tokens each, and the text comes with the last. Some begin alike.
_CHARACTERS = tuple(character.encode() for character in "éèšž€海港風🌊🌬🌅⛵")


class Token(NamedTuple):
    """One generated token, and the text that becomes readable with it: maybe none."""

    id: int
    text: str


class Continuation:
    """What follows the prompt's tokens, token by token; with an `adapter` something else does.

    Raises:
        NoSuchToken: the prompt holds an id outside of the vocabulary.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        seed: int | None = None,
        ignore_eos: bool = False,
        adapter: str = "",
    ) -> None:
        said = decode(prompt)
        self._hash = blake2b(adapter.encode(), digest_size=8, key=str(seed).encode()[:64])
        self._hash.update(said)
        self._ending = said[-len(CLOSING_WORD) :]
        self._ignore_eos = ignore_eos
        # As vLLM's detokenizer, it knows the prompt: a character that the prompt's last token has
        # begun is text of the answer once it is whole.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(said)

    def next_token(self, *, may_end: bool = True) -> Token:
        """The next token; `END_OF_SEQUENCE` when the model has ended its answer."""
        ended = self._ending == CLOSING_WORD.encode()
        if ended and may_end and not self._ignore_eos:
            return Token(END_OF_SEQUENCE, "")
        token_id = self._pick(int.from_bytes(self._hash.digest(), "big"))
        said = token_bytes(token_id)
        self._hash.update(said)
        self._ending = (self._ending + said)[-len(CLOSING_WORD) :]
        return Token(token_id, self._decoder.decode(said))

    def _pick(self, number: int) -> int:
        begun, _ = self._decoder.getstate()
        if begun:
            fitting = [one for one in _CHARACTERS if one.startswith(begun)]
            if fitting:
                return byte_id(fitting[number % len(fitting)][len(begun)])
        number %= len(WORDS) + 1 + len(_CHARACTERS)
        if number > len(WORDS):
            return byte_id(_CHARACTERS[number - len(WORDS) - 1][0])
        after_space = bool(self._ending) and not self._ending[-1:].isspace()
        return word_id((*WORDS, CLOSING_WORD)[number], after_space=after_space)


class StopStrings:
    """Cuts a text that comes in pieces at the first stop string.

    It holds back what may be the beginning of one, so that nothing is ever taken back.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._num_held = max((len(string) for string in stop), default=1) - 1
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """Text that may be shown now, and the stop string that ended it, if one did."""
        text = self._held + piece
        found = [(text.index(string), string) for string in self._stop if string in text]
        if found:
            self._held = ""
            cut, string = min(found)
            return text[:cut], string
        cut = max(len(text) - self._num_held, 0)
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held
