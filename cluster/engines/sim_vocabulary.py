"""The simulated engine's tokens: text to ids and back, without a table on disk.

    id                     token
    2                      end of sequence, without text
    3 ... 258              one byte each
    from 259               the words of `sim_text`, each without and with a space before it
    then                   every run of 2, 3 and 4 printable ASCII characters

Any text has ids, and any ids have bytes. A character outside of ASCII is several tokens, so ids may
end in the middle of a character, as with real byte-level vocabularies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

END_OF_SEQUENCE = 2
CHARACTERS_PER_TOKEN = 4

# The text ends where this word falls, so without a limit an answer has about as many tokens as
# there are words, and is never empty unless the prompt itself ends with this word.
CLOSING_WORD = "calm."

WORDS = tuple(
    """
    a above across after air all along always an anchor and any around as at away back bay be
    beach before below beside between bird blow blue boat bora both bow breeze bright by captain
    change clear cliff cloud coast cold come course crew dark dawn day deck deep down each east
    edge even every fall far fast few find first fish flag for from full gale go gone grey gull
    gust half harbour haul high hill hold home hour hull in into island it keel land late lead
    leave lee light line long low map mast moon morning mouth near net never new night no north
    oar of off old on once open out over past pier port quay rain reef rise rock rope round sail
    salt sand sea shore sky slow so south spray star stern still stone storm strait sun swell that
    the then there tide to tower under until up wait warm watch water wave west where white wide
    wind with
    """.split()  # noqa: SIM905 - a list of 170 quoted words reads worse
)

_FIRST_BYTE = 3
_FIRST_WORD = _FIRST_BYTE + 256
_SPOKEN = tuple(space + word for word in (*WORDS, CLOSING_WORD) for space in ("", " "))
_ID_OF_WORD = {word: _FIRST_WORD + number for number, word in enumerate(_SPOKEN)}
_FIRST_PRINTABLE, _NUM_PRINTABLE = 32, 95
_FIRST_RUN = {2: _FIRST_WORD + len(_SPOKEN)}
_FIRST_RUN[3] = _FIRST_RUN[2] + _NUM_PRINTABLE**2
_FIRST_RUN[4] = _FIRST_RUN[3] + _NUM_PRINTABLE**3
VOCABULARY_SIZE = _FIRST_RUN[4] + _NUM_PRINTABLE**4

# A word, or a run of signs, with the space before it; else one character.
_PARTS = re.compile(r" ?[A-Za-z.]+| ?[!-@\[-`{-~]+|.", re.DOTALL)


class NoSuchToken(ValueError):
    """An id outside of the vocabulary."""


def encode(text: str) -> list[int]:
    """Ids of `text`: one for each known word, else one for each 4 ASCII characters of a word.

    Every word of `WORDS` is one token, so what was generated counts the same when it comes back
    as part of a prompt.
    """
    ids: list[int] = []
    for part in _PARTS.findall(text):
        known = _ID_OF_WORD.get(part)
        if known is not None:
            ids.append(known)
        elif part.isascii() and part.isprintable():
            starts = range(0, len(part), CHARACTERS_PER_TOKEN)
            ids += [_run_id(part[start : start + CHARACTERS_PER_TOKEN]) for start in starts]
        else:  # JSON may hold half a surrogate pair, which plain UTF-8 refuses
            ids += [byte_id(byte) for byte in part.encode("utf-8", "surrogatepass")]
    return ids


def word_id(word: str, *, after_space: bool) -> int:
    """The id of one of `WORDS` or `CLOSING_WORD`, with a space before it or not."""
    return _ID_OF_WORD[f" {word}" if after_space else word]


def byte_id(byte: int) -> int:
    """The id of one byte."""
    return _FIRST_BYTE + byte


def token_bytes(token_id: int) -> bytes:
    """What a token says.

    Raises:
        NoSuchToken: the vocabulary has no such id.
    """
    if not 0 <= token_id < VOCABULARY_SIZE:
        raise NoSuchToken(f"Token id {token_id} is out of vocabulary (0 to {VOCABULARY_SIZE - 1})")
    if token_id < _FIRST_BYTE:
        return b""
    if token_id < _FIRST_WORD:
        return bytes([token_id - _FIRST_BYTE])
    if token_id < _FIRST_RUN[2]:
        return _SPOKEN[token_id - _FIRST_WORD].encode()
    length = max(length for length, first in _FIRST_RUN.items() if first <= token_id)
    number, characters = token_id - _FIRST_RUN[length], bytearray()
    for _ in range(length):
        number, place = divmod(number, _NUM_PRINTABLE)
        characters.append(_FIRST_PRINTABLE + place)
    return bytes(reversed(characters))


def decode(token_ids: Iterable[int]) -> bytes:
    """What tokens say together.

    Raises:
        NoSuchToken: as `token_bytes`.
    """
    return b"".join(map(token_bytes, token_ids))


def text_of(token_ids: Sequence[int]) -> str:
    """The same as text, with U+FFFD for what is no whole character."""
    return decode(token_ids).decode("utf-8", "replace")


def _run_id(run: str) -> int:
    if len(run) == 1:
        return byte_id(ord(run))
    number = 0
    for character in run:
        number = number * _NUM_PRINTABLE + ord(character) - _FIRST_PRINTABLE
    return _FIRST_RUN[len(run)] + number
